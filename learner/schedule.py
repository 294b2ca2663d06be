"""Starts rounds when the clock says so. Wiring only: each round is a process of its own; the lease keeps rounds apart.

- What was missed while no scheduler ran is made up for at once: the first time is counted from the last round, as the
  store has it, and a round that was killed is gone on with.
- A round that is due in quiet hours waits for their end; times that pass meanwhile become one.
- A failed round, recorded by itself, is tried again after longer and longer waits, and keeps no regular one from
  starting.
- SIGTERM and SIGINT are passed on to the round under way, which stops where the next one goes on.
"""

import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from learner.settings import ScheduleSettings, quiet, quiet_hours
from server.store import FeedbackStore

STOP_SECONDS = 60


class RoundScheduler:
    """`run` blocks until SIGTERM or SIGINT. Raises ValueError for a cron line that is none."""

    def __init__(self, settings: ScheduleSettings, data_dir: Path, say: Callable[[str], None]) -> None:
        self._settings, self._data_dir, self._say = settings, data_dir, say
        # One thread: a regular time that comes while a round runs, or waits to be retried, starts when that is over.
        self._scheduler = BlockingScheduler(executors={"default": ThreadPoolExecutor(1)})
        self._trigger: BaseTrigger = (
            IntervalTrigger(minutes=settings.interval_minutes)
            if settings.interval_minutes
            else CronTrigger.from_crontab(settings.cron)
        )
        self._round: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._stopping = False

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        first = first_time(self._trigger, *self._last_round(), datetime.now().astimezone())
        self._say(f"first round: {first:%Y-%m-%d %H:%M}")
        self._add("round", self._trigger, next_run_time=first)
        self._scheduler.start()
        if round_ := self._round:
            with suppress(subprocess.TimeoutExpired):
                round_.wait(STOP_SECONDS)

    def due(self) -> None:
        """A time has come: starts a round, or says why not."""
        now = datetime.now().astimezone()
        if self._stopping:
            return
        if wait := quiet_until(self._settings.quiet_hours, now):
            self._say(f"quiet hours: the round waits until {wait:%H:%M}")
            self._again(wait)
        elif (votes := self._new_votes()) < self._settings.min_new_votes:
            self._say(f"no round: {votes} new votes, fewer than {self._settings.min_new_votes}")
        elif (status := self._run_round()) and not self._stopping:
            self._failed(status, now)
        else:
            self._failures = 0

    def _failed(self, status: int, now: datetime) -> None:
        self._failures += 1
        if self._failures > self._settings.retries:
            self._say(f"the round failed (exit status {status}); next at its regular time")
            self._failures = 0
            return
        wait = now + backoff(self._settings.retry_minutes, self._failures)
        self._say(f"the round failed (exit status {status}); again at {wait:%H:%M}")
        self._again(wait)

    def _run_round(self) -> int:
        # In a session of its own: Ctrl-C reaches it through us, once.
        self._round = round_ = subprocess.Popen(round_command(self._data_dir), start_new_session=True)
        if self._stopping:
            round_.terminate()  # The stop came while it was being started.
        try:
            return round_.wait()
        finally:
            self._round = None

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True
        if round_ := self._round:
            round_.terminate()
        if not self._scheduler.running:
            raise SystemExit(0)  # Before its start there is nothing to shut down.
        self._scheduler.shutdown(wait=False)

    def _again(self, when: datetime) -> None:
        self._add("again", "date", run_date=when)

    def _add(self, name: str, trigger: BaseTrigger | str, **options: Any) -> None:
        self._scheduler.add_job(
            self.due, trigger, id=name, replace_existing=True,
            # Missed times become one; one may wait while another runs.
            coalesce=True, max_instances=2, misfire_grace_time=None, **options,
        )  # fmt: skip

    def _new_votes(self) -> int:
        if not FeedbackStore.exists(self._data_dir):
            return 0
        with closing(FeedbackStore.open(self._data_dir)) as store:
            if store.registry.running_round():
                return sys.maxsize  # It was stopped: go on with it, whatever came since.
            return store.count_new_votes()

    def _last_round(self) -> tuple[datetime | None, bool]:
        """When the last round began, and whether it was stopped."""
        if not FeedbackStore.exists(self._data_dir):
            return None, False
        with closing(FeedbackStore.open(self._data_dir)) as store:
            rounds = store.registry.rounds(limit=1)
        if not rounds:
            return None, False
        return datetime.fromtimestamp(rounds[0].create_time).astimezone(), rounds[0].state == "running"


def round_command(data_dir: Path) -> list[str]:
    """A round as a process, so that its memory and threads end with it."""
    return [sys.executable, "-m", "learner.cli", "run-once", "--data-dir", str(data_dir)]


def first_time(trigger: BaseTrigger, last: datetime | None, stopped: bool, now: datetime) -> datetime:
    """When the first round starts: now, where its time came while no scheduler ran."""
    if stopped:
        return now
    due: datetime = trigger.get_next_fire_time(last, last or now)
    return max(due, now)


def backoff(minutes: float, failures: int) -> timedelta:
    """The wait after so many failures in a row."""
    return timedelta(minutes=minutes * 2 ** (failures - 1))


def quiet_until(hours: str, now: datetime) -> datetime | None:
    """When the quiet hours that `now` lies in end; None outside them."""
    if not quiet(hours, now.time()):
        return None
    _, end = quiet_hours(hours)
    today = now.replace(hour=end.hour, minute=end.minute, second=0, microsecond=0)
    return today if today > now else today + timedelta(days=1)
