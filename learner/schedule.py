"""Starts a round when the clock says so. Wiring only: each round is a subprocess, the lease keeps rounds apart, and a
round that fails is recorded by the round itself."""

import subprocess
import sys
from pathlib import Path


def run_scheduler(cron: str, data_dir: Path) -> None:
    """Blocks until SIGINT or SIGTERM. `cron` has five fields, in local time."""
    from apscheduler.schedulers.blocking import BlockingScheduler
    from apscheduler.triggers.cron import CronTrigger

    scheduler = BlockingScheduler()
    # Missed starts become one, and a round that takes longer than the interval delays the next.
    scheduler.add_job(
        run_round,
        CronTrigger.from_crontab(cron),
        args=[data_dir],
        coalesce=True,
        max_instances=1,
        misfire_grace_time=None,
    )
    scheduler.start()


def run_round(data_dir: Path) -> int:
    """`learner run-once` in a process of its own, so that its memory and threads end with it."""
    command = [sys.executable, "-m", "learner.cli", "run-once", "--data-dir", str(data_dir)]
    return subprocess.run(command, check=False).returncode
