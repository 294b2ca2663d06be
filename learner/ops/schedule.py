"""Starts rounds by the clock or when RequestRound asks for one. Each round is a separate process; the lease keeps
rounds apart.

- A round that was missed while no scheduler ran starts at once: the first time is counted from the last round in the
  store. A round that was killed is resumed.
- A round that is due in quiet hours waits for their end. Times that pass meanwhile become one.
- A failed round is retried with growing delays. It does not delay the next regular round.
- A request starts a round at once, at any hour and with any number of votes. If the clock starts a round first, that
  round answers the request. The outcome is stored. A failed request is not retried: the user can ask again.
- SIGTERM and SIGINT are passed on to the running round, which stops where the next one resumes. That one also answers
  the request.
"""

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.interval import IntervalTrigger

from learner.ops.cron import Cron, local_zone
from learner.ops.request_poller import RequestPoller
from learner.process import STOPPED
from learner.round.report import Report, outcome
from learner.round.sft.due import due
from learner.schedule_settings import ScheduleSettings, quiet, quiet_hours
from server.shared.errors import DatabaseError, ServiceError
from server.store.store import Store

STOP_SECONDS = 60
# How often storing a request's outcome is tried again.
WRITE_SECONDS = 2.0


class RoundScheduler:
    """`run` blocks until SIGTERM or SIGINT. Raises ValueError for an invalid cron line or TZ."""

    def __init__(
        self, settings: ScheduleSettings, data_dir: Path, say: Callable[[str], None], min_examples: int = 0
    ) -> None:
        """Without new votes a round also starts if `min_examples` demonstrations and corrections wait; 0: never."""
        self._settings, self._data_dir, self._say, self._min_examples = settings, data_dir, say, min_examples
        # One thread: if a regular time comes while a round is running or waits for a retry, its round starts
        # afterwards.
        self._zone = local_zone()
        self._scheduler = BlockingScheduler(executors={"default": ThreadPoolExecutor(1)}, timezone=self._zone)
        self._trigger = trigger(settings, self._zone)
        self._listener = RequestPoller(data_dir, self._asked, self._next_time, self._look_at_clock, say)
        self._round: subprocess.Popen[bytes] | None = None
        # Held from before a round starts until its outcome is stored.
        self._at_work = threading.Lock()
        self._failures = 0
        self._stopping = False

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        if self._trigger:
            first = first_time(self._trigger, *self._last_round(), datetime.now(self._zone))
            self._say(f"first round: {first:%Y-%m-%d %H:%M}")
            self._add("round", self.due, self._trigger, next_run_time=first)
        else:
            self._say("rounds start on request")
        self._listener.start()
        try:
            self._scheduler.start()
            if self._at_work.acquire(timeout=STOP_SECONDS):
                self._at_work.release()
        finally:
            self._listener.stop()

    def due(self) -> None:
        """Starts the round that is due, or reports why not."""
        now = datetime.now(self._zone)
        if self._stopping:
            return
        if wait := quiet_until(self._settings.quiet_hours, now):
            self._say(f"quiet hours: the round waits until {wait:%H:%M}")
            self._again(wait)
        elif (votes := self._new_votes()) < self._settings.min_new_votes:
            self._say(f"no round: {votes} new votes, fewer than {self._settings.min_new_votes}")
        elif (status := self._work()) and not self._stopping:
            self._failed(status, now)
        else:
            self._failures = 0

    def asked(self) -> None:
        """Starts a requested round, unless another round has answered the request."""
        self._work(only_asked=True)

    def _work(self, *, only_asked: bool = False) -> int:
        """Runs a round and stores its outcome for the user who requested it; returns its exit status."""
        with self._at_work:
            if self._stopping:
                return 0
            request = self._take()
            if only_asked and request is None:
                return 0
            try:
                status, report = self._run_round()
            except OSError as error:
                status, report = 1, Report("failed", f"its process could not be started: {error}")
            # If it was stopped together with this process, the next learner accepts the request again.
            if request is not None and not (self._stopping and report is None):
                self._end(request, outcome(report) if report else abrupt_end(status))
            return status

    def _failed(self, status: int, now: datetime) -> None:
        self._failures += 1
        if self._failures > self._settings.retries:
            self._say(f"the round failed (exit status {status}); the next one starts at its regular time")
            self._failures = 0
            return
        wait = now + backoff(self._settings.retry_minutes, self._failures)
        self._say(f"the round failed (exit status {status}); retrying at {wait:%H:%M}")
        self._again(wait)

    def _run_round(self) -> tuple[int, Report | None]:
        """Runs a round; returns its exit status and its report, if it wrote one."""
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "report.json"
            # In a separate session, so that Ctrl-C reaches it only through this process, once.
            self._round = round_ = subprocess.Popen(round_command(self._data_dir, file), start_new_session=True)
            if self._stopping:
                round_.terminate()  # The stop came while it was being started.
            try:
                return round_.wait(), read_report(file)
            finally:
                self._round = None

    def _asked(self) -> None:
        """Called from the listener's thread."""
        if not self._at_work.locked():
            self._add("asked", self.asked, None)

    def _look_at_clock(self) -> None:
        """Called from the listener's thread, every other second. The scheduler sleeps until its next time by the
        monotonic clock; if somebody changes the time of day, it has to look again."""
        if self._scheduler.running:
            self._scheduler.wakeup()

    def _take(self) -> int | None:
        if not Store.exists(self._data_dir):
            return None
        with closing(Store.open(self._data_dir)) as store:
            return store.round_requests.take(self._listener.name)

    def _end(self, request: int, sentence: str) -> None:
        self._say(f"requested round: {sentence}")
        # Retried until it is stored: until then the user waits, and no other round can be requested.
        while True:
            try:
                with closing(Store.open(self._data_dir)) as store:
                    store.round_requests.end(request, self._listener.name, sentence)
                return
            except (ServiceError, DatabaseError) as error:
                if self._stopping:
                    return
                self._say(f"the outcome cannot be stored yet: {error}")
            time.sleep(WRITE_SECONDS)

    def _next_time(self) -> float | None:
        times = [getattr(self._scheduler.get_job(name), "next_run_time", None) for name in ("round", "again")]
        return min((when.timestamp() for when in times if when), default=None)

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True
        if round_ := self._round:
            round_.terminate()
        if not self._scheduler.running:
            raise SystemExit(0)  # Before its start there is nothing to shut down.
        self._scheduler.shutdown(wait=False)

    def _again(self, when: datetime) -> None:
        self._add("again", self.due, "date", run_date=when)

    def _add(self, name: str, work: Callable[[], None], trigger: BaseTrigger | str | None, **options: Any) -> None:
        self._scheduler.add_job(
            work, trigger, id=name, replace_existing=True,
            # Missed times become one; one may wait while another is running.
            coalesce=True, max_instances=2, misfire_grace_time=None, **options,
        )  # fmt: skip

    def _new_votes(self) -> int:
        if not Store.exists(self._data_dir):
            return 0
        with closing(Store.open(self._data_dir)) as store:
            if store.rounds.running():
                return sys.maxsize  # It was stopped: resume it, however few votes are new.
            if due(store, self._min_examples):
                return sys.maxsize  # Demonstrations wait, and need no votes.
            return store.snapshots.count_new_votes()

    def _last_round(self) -> tuple[datetime | None, bool]:
        """When the last round began, and whether it was stopped."""
        if not Store.exists(self._data_dir):
            return None, False
        with closing(Store.open(self._data_dir)) as store:
            rounds = store.rounds.page(limit=1)
        if not rounds:
            return None, False
        return datetime.fromtimestamp(rounds[0].create_time, self._zone), rounds[0].state == "running"


def trigger(settings: ScheduleSettings, zone: tzinfo) -> BaseTrigger | None:
    """The trigger for the clock's times; None if there is no clock. Raises ValueError."""
    if settings.on_request:
        return None
    if settings.interval_minutes:
        return IntervalTrigger(minutes=settings.interval_minutes, timezone=zone)
    return Cron(settings.cron, zone)


def round_command(data_dir: Path, report: Path) -> list[str]:
    """A round as a process, so that its memory and threads end with it."""
    command = [sys.executable, "-m", "learner.cli", "run-once"]
    return [*command, "--data-dir", str(data_dir), "--report", str(report)]


def read_report(file: Path) -> Report | None:
    """The report that a round wrote; None if it was killed first."""
    try:
        return Report.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def abrupt_end(status: int) -> str:
    """The outcome of a round that wrote no report."""
    if status == STOPPED:
        return "the round was stopped; the next one resumes it"
    if status < 0:
        return f"the round failed: its process was killed by signal {-status}; the next one resumes it"
    return f"the round failed: its process exited with status {status}; see the learner's output"


def first_time(trigger: BaseTrigger, last: datetime | None, stopped: bool, now: datetime) -> datetime:
    """When the first round starts: now, if its time came while no scheduler ran."""
    if stopped:
        return now
    # A clock that was wrong may have put the last round into the future.
    last = min(last, now) if last else None
    due: datetime = trigger.get_next_fire_time(last, last or now)
    return max(due, now)


def backoff(minutes: float, failures: int) -> timedelta:
    """The delay after so many failures in a row."""
    return timedelta(minutes=minutes * 2 ** (failures - 1))


def quiet_until(hours: str, now: datetime) -> datetime | None:
    """The end of the quiet hours that `now` is in; None outside them."""
    if not quiet(hours, now.time()):
        return None
    _, end = quiet_hours(hours)
    today = now.replace(hour=end.hour, minute=end.minute, second=0, microsecond=0)
    return today if today > now else today + timedelta(days=1)
