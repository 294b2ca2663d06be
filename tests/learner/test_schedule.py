"""When rounds start, wait, and start again. Nothing here waits for a clock."""

import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger
from pydantic import ValidationError

import learner.schedule
from learner.schedule import RoundScheduler, backoff, first_time, quiet_until, round_command
from learner.settings import ScheduleSettings
from server.store import FeedbackStore

NOON = datetime(2026, 11, 23, 12, 0).astimezone()


def hours(count: float) -> timedelta:
    return timedelta(hours=count)


@pytest.mark.parametrize(
    ("at", "until"),
    [
        ("22:00-07:00", None),
        ("07:00-12:00", None),
        ("12:00-13:30", NOON + hours(1.5)),
        ("11:00-07:00", NOON + hours(19)),
        ("", None),
    ],
)
def test_quiet_hours_end_today_or_tomorrow(at: str, until: datetime | None) -> None:
    assert quiet_until(at, NOON) == until


def test_hours_that_are_none_are_refused() -> None:
    with pytest.raises(ValidationError, match="'noon' are no hours; 22:00-07:00 are"):
        ScheduleSettings(quiet_hours="noon")


def test_what_was_missed_while_no_scheduler_ran_starts_now() -> None:
    nightly, hourly = CronTrigger.from_crontab("0 3 * * *"), IntervalTrigger(minutes=60)
    assert first_time(nightly, None, False, NOON) == NOON + hours(15)
    assert first_time(nightly, NOON - hours(1), False, NOON) == NOON + hours(15)
    assert first_time(nightly, NOON - hours(24), False, NOON) == NOON
    assert first_time(hourly, NOON - hours(3), False, NOON) == NOON
    assert first_time(nightly, NOON - hours(1), True, NOON) == NOON  # A round was stopped: go on with it.


def test_each_wait_is_twice_the_one_before() -> None:
    assert [backoff(5, failures) for failures in (1, 2, 3)] == [hours(1 / 12), hours(1 / 6), hours(1 / 3)]


class Scheduled:
    """A scheduler whose rounds end as it is told, and the times it asked for."""

    def __init__(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.said: list[str] = []
        self.times: list[datetime] = []
        self.scheduler = RoundScheduler(ScheduleSettings(**settings), data_dir, self.said.append)
        monkeypatch.setattr(self.scheduler, "_again", self.times.append)

    def ends(self, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
        monkeypatch.setattr(self.scheduler, "_run_round", lambda: status)
        self.scheduler.due()


def test_a_failed_round_is_tried_again_ever_later_and_blocks_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduled = Scheduled(data_dir, monkeypatch, retries=2, retry_minutes=10)
    started = datetime.now().astimezone()
    for _ in range(3):
        scheduled.ends(monkeypatch, 1)
    waits = [round((when - started).total_seconds() / 60) for when in scheduled.times]
    assert waits == [10, 20]
    assert scheduled.said[-1] == "the round failed (exit status 1); next at its regular time"
    # A round that ends well starts the count anew.
    scheduled.ends(monkeypatch, 1)
    scheduled.ends(monkeypatch, 0)
    scheduled.ends(monkeypatch, 1)
    assert round((scheduled.times[-1] - started).total_seconds() / 60) == 10


def test_too_few_new_votes_start_no_round(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduled = Scheduled(data_dir, monkeypatch, min_new_votes=81)
    monkeypatch.setattr(scheduled.scheduler, "_run_round", lambda: pytest.fail("a round started"))
    scheduled.scheduler.due()
    assert scheduled.said == ["no round: 80 new votes, fewer than 81"]
    store = FeedbackStore.open(data_dir)
    fence = store.registry.acquire_lease("learner", "here", 60)
    assert fence
    # One that was stopped is gone on with, whatever came since.
    store.registry.create_round(store.watermark(), {}, reference_version="v0000", fence=fence)
    started: list[int] = []
    monkeypatch.setattr(scheduled.scheduler, "_run_round", lambda: started.append(1) or 0)
    scheduled.scheduler.due()
    assert started == [1]


def test_quiet_hours_put_a_round_off(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now().astimezone()
    around = f"{now - hours(1):%H:%M}-{now + hours(1):%H:%M}"
    scheduled = Scheduled(data_dir, monkeypatch, quiet_hours=around)
    monkeypatch.setattr(scheduled.scheduler, "_run_round", lambda: pytest.fail("a round started"))
    scheduled.scheduler.due()
    assert [f"{when:%H:%M}" for when in scheduled.times] == [f"{now + hours(1):%H:%M}"]


def test_a_round_is_a_process_of_its_own() -> None:
    assert round_command(Path("here")) == [sys.executable, "-m", "learner.cli", "run-once", "--data-dir", "here"]


def test_a_stop_while_a_round_is_being_started_reaches_it(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        learner.schedule, "round_command", lambda data_dir: [sys.executable, "-c", "import signal; signal.pause()"]
    )
    scheduler = RoundScheduler(ScheduleSettings(), data_dir, lambda line: None)
    scheduler._stopping = True
    assert scheduler._run_round() == -signal.SIGTERM


STOPPABLE = """
import signal, sys
from pathlib import Path
def stop(*_):
    Path(sys.argv[1]).write_text("stopped")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("running", flush=True)
signal.pause()
"""
SCHEDULER = """
import sys
from pathlib import Path
import learner.schedule as schedule
from learner.settings import ScheduleSettings
schedule.round_command = lambda data_dir: [sys.executable, "-c", sys.argv[2], sys.argv[3]]
settings = ScheduleSettings(interval_minutes=0.001)
schedule.RoundScheduler(settings, Path(sys.argv[1]), lambda line: None).run()
"""


def test_a_stop_reaches_the_round_and_ends_the_scheduler(data_dir: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    process = subprocess.Popen(
        [sys.executable, "-c", SCHEDULER, str(data_dir), STOPPABLE, str(mark)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert mark.read_text() == "stopped"


def test_the_command_waits_until_it_is_stopped(data_dir: Path) -> None:
    command = [sys.executable, "-m", "learner.cli", "schedule", "--data-dir", str(data_dir), "--cron", "0 3 * * *"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout
    assert process.stdout.readline().startswith("first round: ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
