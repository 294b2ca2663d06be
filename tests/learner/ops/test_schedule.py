"""When rounds start, wait, and are retried. No test waits for real time to pass."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from apscheduler.triggers.interval import IntervalTrigger
from pydantic import ValidationError
from typer.testing import CliRunner

import learner.ops.schedule
from learner.cli import app
from learner.ops.cron import Cron
from learner.ops.request_poller import RequestPoller
from learner.ops.schedule import (
    RoundScheduler,
    abrupt_end,
    backoff,
    first_time,
    quiet_until,
    read_report,
    round_command,
)
from learner.round.report import Report, outcome
from learner.schedule_settings import ScheduleSettings
from server.shared.errors import DatabaseError, FailedPreconditionError
from server.store.learning.round_requests import RoundRequests
from server.store.store import Store
from tests.learner.round.test_sft import demonstrate

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


def test_invalid_hours_are_refused() -> None:
    with pytest.raises(ValidationError, match="'noon' is not a range of hours such as 22:00-07:00"):
        ScheduleSettings(quiet_hours="noon")


def test_a_round_missed_while_no_scheduler_ran_starts_now() -> None:
    nightly, hourly = Cron("0 3 * * *", NOON.tzinfo or UTC), IntervalTrigger(minutes=60)
    assert first_time(nightly, None, False, NOON) == NOON + hours(15)
    assert first_time(nightly, NOON - hours(1), False, NOON) == NOON + hours(15)
    assert first_time(nightly, NOON - hours(24), False, NOON) == NOON
    assert first_time(hourly, NOON - hours(3), False, NOON) == NOON
    assert first_time(nightly, NOON - hours(1), True, NOON) == NOON  # A round was stopped: resume it.
    # The last round began when the clock was a year ahead.
    assert first_time(nightly, NOON + hours(365 * 24), False, NOON) == NOON + hours(15)


def test_each_delay_is_twice_the_one_before() -> None:
    assert [backoff(5, failures) for failures in (1, 2, 3)] == [hours(1 / 12), hours(1 / 6), hours(1 / 3)]


class Scheduled:
    """A scheduler whose rounds end as the test sets, and the times it planned."""

    def __init__(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.said: list[str] = []
        self.times: list[datetime] = []
        self.scheduler = RoundScheduler(ScheduleSettings(**settings), data_dir, self.said.append)
        monkeypatch.setattr(self.scheduler, "_again", self.times.append)

    def ends(self, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
        monkeypatch.setattr(self.scheduler, "_run_round", lambda: (status, None))
        self.scheduler.due()


def test_a_failed_round_is_retried_with_growing_delays_and_blocks_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduled = Scheduled(data_dir, monkeypatch, retries=2, retry_minutes=10)
    started = datetime.now().astimezone()
    for _ in range(3):
        scheduled.ends(monkeypatch, 1)
    waits = [round((when - started).total_seconds() / 60) for when in scheduled.times]
    assert waits == [10, 20]
    assert scheduled.said[-1] == "the round failed (exit status 1); the next one starts at its regular time"
    # A round that succeeds resets the count.
    scheduled.ends(monkeypatch, 1)
    scheduled.ends(monkeypatch, 0)
    scheduled.ends(monkeypatch, 1)
    assert round((scheduled.times[-1] - started).total_seconds() / 60) == 10


def test_too_few_new_votes_start_no_round(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduled = Scheduled(data_dir, monkeypatch, min_new_votes=81)
    monkeypatch.setattr(scheduled.scheduler, "_run_round", lambda: pytest.fail("a round started"))
    scheduled.scheduler.due()
    assert scheduled.said == ["no round: 80 new votes, fewer than 81"]
    store = Store.open(data_dir)
    fence = store.leases.acquire("learner", "here", 60)
    assert fence
    # A stopped round is resumed, however few votes are new.
    store.rounds.create(store.snapshots.watermark(), {}, reference_version="v0000", fence=fence)
    started: list[int] = []
    monkeypatch.setattr(scheduled.scheduler, "_run_round", lambda: started.append(1) or (0, None))
    scheduled.scheduler.due()
    assert started == [1]


def test_enough_demonstrations_start_a_round_without_votes(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrate(data_dir, 10)
    demonstrate(data_dir, 10, first=10, user="eve")
    for least, said in ((21, ["no round: 80 new votes, fewer than 81"]), (20, [])):
        spoken: list[str] = []
        scheduler = RoundScheduler(ScheduleSettings(min_new_votes=81), data_dir, spoken.append, least)
        monkeypatch.setattr(scheduler, "_run_round", lambda: (0, None))
        scheduler.due()
        assert spoken == said


def test_quiet_hours_postpone_a_round(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now().astimezone()
    around = f"{now - hours(1):%H:%M}-{now + hours(1):%H:%M}"
    scheduled = Scheduled(data_dir, monkeypatch, quiet_hours=around)
    monkeypatch.setattr(scheduled.scheduler, "_run_round", lambda: pytest.fail("a round started"))
    scheduled.scheduler.due()
    assert [f"{when:%H:%M}" for when in scheduled.times] == [f"{now + hours(1):%H:%M}"]


def test_a_round_is_a_separate_process() -> None:
    command = [sys.executable, "-m", "learner.cli", "run-once", "--data-dir", "here", "--report", "said.json"]
    assert round_command(Path("here"), Path("said.json")) == command


def test_a_stop_while_a_round_is_being_started_reaches_it(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pausing = [sys.executable, "-c", "import signal; signal.pause()"]
    monkeypatch.setattr(learner.ops.schedule, "round_command", lambda data_dir, report: pausing)
    scheduler = RoundScheduler(ScheduleSettings(), data_dir, lambda line: None)
    scheduler._stopping = True
    assert scheduler._run_round() == (-signal.SIGTERM, None)


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
import learner.ops.schedule as schedule
from learner.schedule_settings import ScheduleSettings
schedule.round_command = lambda data_dir, report: [sys.executable, "-c", sys.argv[2], sys.argv[3], str(report)]
settings = ScheduleSettings(on_request=True) if "on request" in sys.argv else ScheduleSettings(interval_minutes=0.001)
say = lambda line: print(line, flush=True) if settings.on_request else None
schedule.RoundScheduler(settings, Path(sys.argv[1]), say).run()
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


# Requests


class Asked(Scheduled):
    """A scheduler that listens on a store, and how its rounds end."""

    def __init__(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        super().__init__(data_dir, monkeypatch, **settings)
        self.store = Store.open(data_dir)
        self.name = self.scheduler._listener.name
        self.store.round_requests.listen(self.name, None)
        self.ran = 0
        self.end: Any = (0, Report("nothing", "There are no votes yet; nothing was changed."))
        monkeypatch.setattr(self.scheduler, "_run_round", self.run)

    def run(self) -> Any:
        self.ran += 1
        if isinstance(self.end, Exception):
            raise self.end
        return self.end

    @property
    def outcome(self) -> str | None:
        """The outcome of the last request; None while it is open."""
        last = self.store.round_requests.last()
        assert last
        assert (last.end_time is None) == (last.outcome == "")
        return last.outcome or None


def test_a_request_is_answered_whatever_the_hour_and_however_few_the_votes(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now().astimezone()
    around = f"{now - hours(1):%H:%M}-{now + hours(1):%H:%M}"
    asked = Asked(data_dir, monkeypatch, quiet_hours=around, min_new_votes=81)
    asked.scheduler.asked()
    assert asked.ran == 0  # Nobody asked.
    asked.store.round_requests.ask()
    asked.scheduler.asked()
    assert (asked.ran, asked.outcome) == (1, "nothing to learn: There are no votes yet; nothing was changed.")
    assert asked.said == ["requested round: nothing to learn: There are no votes yet; nothing was changed."]
    asked.scheduler.asked()
    assert asked.ran == 1


def test_a_round_that_the_clock_starts_answers_a_waiting_request(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(data_dir, monkeypatch)
    asked.store.round_requests.ask()
    asked.end = (0, Report("promoted", "v0001 is active instead of v0000; no server.", "round_1", "v0001"))
    asked.scheduler.due()
    assert asked.outcome == "v0001 is promoted: v0001 is active instead of v0000; no server."
    asked.scheduler.asked()
    assert asked.ran == 1
    # Started by the clock alone: the last request's outcome stays.
    asked.end = (0, Report("nothing", "There are no new votes."))
    asked.scheduler.due()
    assert asked.ran == 2
    assert asked.outcome == "v0001 is promoted: v0001 is active instead of v0000; no server."


def test_a_requested_round_that_fails_is_reported_and_not_retried(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(data_dir, monkeypatch)
    for end, said in (
        ((1, Report("failed", "no space")), "the round failed: no space"),
        ((-9, None), "the round failed: its process was killed by signal 9; the next one resumes it"),
        (OSError(28, "No space left"), "the round failed: its process could not be started: [Errno 28] No space left"),
    ):
        asked.end = end
        asked.store.round_requests.ask()
        asked.scheduler.asked()
        assert asked.outcome == said
    assert (asked.ran, asked.times) == (3, [])


def test_a_request_waits_while_another_learner_is_running(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(data_dir, monkeypatch)
    asked.store.round_requests.ask()
    by_hand = asked.store.leases.acquire("learner", "by hand", 60)
    assert by_hand
    asked.scheduler.asked()
    assert (asked.ran, asked.outcome) == (0, None)
    asked.store.leases.release(by_hand)
    asked.scheduler.asked()
    assert asked.ran == 1
    assert asked.outcome


def test_an_outcome_that_cannot_be_stored_at_once_is_stored_later(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(data_dir, monkeypatch)
    monkeypatch.setattr(learner.ops.schedule, "WRITE_SECONDS", 0)
    end, tries = RoundRequests.end, []

    def full(*arguments: Any) -> bool:
        tries.append(arguments)
        if len(tries) == 1:
            raise DatabaseError("database or disk is full")
        return end(*arguments)

    monkeypatch.setattr(RoundRequests, "end", full)
    asked.store.round_requests.ask()
    asked.scheduler.asked()
    assert asked.outcome == "nothing to learn: There are no votes yet; nothing was changed."
    assert asked.said[-1] == "the outcome cannot be stored yet: database or disk is full"


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (Report("promoted", "v0003 is active instead of v0002; so.", "r", "v0003"),
         "v0003 is promoted: v0003 is active instead of v0002; so."),
        (Report("rejected", "v0003 was not promoted: It is worse.", "r", "v0003"),
         "v0003 was not promoted: It is worse."),
        (Report("rejected", "The votes carry too little signal.", "r"),
         "no new version: The votes carry too little signal."),
        (Report("nothing", "There are no votes yet."), "nothing to learn: There are no votes yet."),
        (Report("failed", "no space"), "the round failed: no space"),
    ],
)  # fmt: skip
def test_the_outcome_of_a_round_is_a_sentence(report: Report, said: str) -> None:
    assert outcome(report) == said


def test_a_round_without_a_report_is_described_by_its_exit_status(tmp_path: Path) -> None:
    assert abrupt_end(130) == "the round was stopped; the next one resumes it"
    assert abrupt_end(-15) == "the round failed: its process was killed by signal 15; the next one resumes it"
    assert abrupt_end(2) == "the round failed: its process exited with status 2; see the learner's output"
    for text in (None, "", '{"state": "prom', "[]", '{"other": 1}'):
        if text is not None:
            (tmp_path / "said").write_text(text)
        assert read_report(tmp_path / "said") is None


def test_status_shows_the_last_request_and_the_listener(data_dir: Path) -> None:
    def shown() -> str:
        return CliRunner().invoke(app, ["status", "--data-dir", str(data_dir)]).stdout

    assert "listening  no learner; `learner schedule` starts rounds by the clock or on request" in shown()
    assert "requested" not in shown()
    with closing(Store.open(data_dir)) as store:
        store.round_requests.listen("one", None)
        assert "listening  a learner that starts rounds on request" in shown()
        store.round_requests.listen("two", datetime(2026, 11, 24, 3, 0).timestamp())
        assert "listening  a learner; its next round starts 2026-11-24 03:00" in shown()
        when = datetime.fromtimestamp(store.round_requests.ask().create_time).strftime("%Y-%m-%d %H:%M")
        assert f"requested  {when}: not finished yet" in shown()
        request = store.round_requests.take("one")
        assert request
        store.round_requests.end(request, "one", "nothing to learn: so")
        assert f"requested  {when}: nothing to learn: so" in shown()
        found = json.loads(CliRunner().invoke(app, ["status", "--json", "--data-dir", str(data_dir)]).stdout)
    assert (found["listening"], found["request"]["outcome"]) == (True, "nothing to learn: so")


class Listening:
    """`learner schedule --on-request` as a process, whose rounds run a program of the test."""

    def __init__(self, data_dir: Path, program: str, mark: Path) -> None:
        command = [sys.executable, "-c", SCHEDULER, str(data_dir), program, str(mark), "on request"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.says() == "rounds start on request"

    def says(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def until(answer: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (found := answer()):
        assert time.monotonic() < deadline
    return found


ENDS = """
import json, pathlib, sys
pathlib.Path(sys.argv[2]).write_text(json.dumps({"state": "nothing", "sentence": "No."}))
"""


def test_a_request_that_was_stopped_with_its_learner_is_answered_by_the_next(data_dir: Path, tmp_path: Path) -> None:
    with closing(Store.open(data_dir)) as store:
        first = Listening(data_dir, STOPPABLE, tmp_path / "mark")
        until(lambda: store.learner().listening)
        asked = store.round_requests.ask()
        assert first.says() == "running"
        with pytest.raises(FailedPreconditionError, match="A round is running"):
            store.round_requests.ask()
        assert first.stop() == 0
        assert (tmp_path / "mark").read_text() == "stopped"
        assert store.learner().listening is False
        assert store.round_requests.last() == asked
        second = Listening(data_dir, ENDS, tmp_path / "mark")
        assert second.says() == "requested round: nothing to learn: No."
        last = until(lambda: (found := store.round_requests.last()) and found.end_time and found)
        assert (last.create_time, last.outcome) == (asked.create_time, "nothing to learn: No.")
        assert second.stop() == 0


def test_a_request_whose_learner_was_killed_is_answered_by_the_next(data_dir: Path, tmp_path: Path) -> None:
    with closing(Store.open(data_dir)) as store:
        first = Listening(
            data_dir, "import os, signal; print(os.getpid(), flush=True); signal.pause()", tmp_path / "mark"
        )
        until(lambda: store.learner().listening)
        store.round_requests.ask()
        orphan = int(first.says())
        first.process.kill()
        first.process.wait(30)
        os.kill(orphan, signal.SIGKILL)
        # Half a minute later.
        store._db.execute("UPDATE listeners SET uptime = uptime - 31")
        second = Listening(data_dir, ENDS, tmp_path / "mark")
        assert second.says() == "requested round: nothing to learn: No."
        assert second.stop() == 0


def test_on_request_waits_for_its_data_directory_and_runs_requested_rounds(tmp_path: Path) -> None:
    """The command itself, and the round that it starts."""
    data_dir = tmp_path / "none" / "yet"
    command = [sys.executable, "-m", "learner.cli", "schedule", "--on-request", "--data-dir", str(data_dir)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    assert process.stdout.readline() == "rounds start on request\n"
    assert not data_dir.exists()
    with closing(Store.open(data_dir)) as store:
        until(lambda: store.learner().listening)
        assert store.learner().next_time is None
        store.policies.register_reference()
        store.round_requests.ask()
        for line in process.stdout:
            if line.startswith("requested round"):
                break
        assert line == "requested round: nothing to learn: There are no votes yet; nothing was changed.\n"
        until(lambda: (last := store.round_requests.last()) and last.end_time)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not store.learner().listening


def test_waiting_for_a_data_directory_does_not_create_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    listener = RequestPoller(tmp_path / "none", lambda: None, lambda: None, lambda: None, said.append)
    monkeypatch.setattr(listener._stop, "wait", lambda seconds: listener._stop.set())
    listener._run()
    assert (list(tmp_path.iterdir()), said) == ([], [])


def test_an_error_while_polling_is_reported_once_and_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    Store.open(tmp_path).close()
    listener = RequestPoller(tmp_path, lambda: None, lambda: None, lambda: None, said.append)
    tries: list[int] = []

    def listen(*arguments: Any) -> None:
        tries.append(1)
        if len(tries) == 5:
            listener._stop.set()
        elif len(tries) != 3:
            raise DatabaseError("database or disk is full")

    monkeypatch.setattr(RoundRequests, "listen", listen)
    monkeypatch.setattr(RoundRequests, "waits", lambda requests: len(tries) == 3 and requests._db.rows("none"))
    monkeypatch.setattr(listener._stop, "wait", lambda seconds: None)
    listener._run()
    # The same error twice, then none, then another error, and the first one again.
    assert said == [
        "requests cannot be read: database or disk is full",
        'requests cannot be read: near "none": syntax error',
        "requests cannot be read: database or disk is full",
    ]
    assert len(tries) == 5


def test_the_time_of_the_next_round_is_recorded(data_dir: Path) -> None:
    command = [sys.executable, "-m", "learner.cli", "schedule", "--data-dir", str(data_dir), "--cron", "0 3 * * *"]
    process = subprocess.Popen(command, env={**os.environ, "PREFLOOP_SCHEDULE__ON_REQUEST": "true"})
    with closing(Store.open(data_dir)) as store:
        until(lambda: store.learner().next_time)
        when = datetime.fromtimestamp(store.learner().next_time or 0)
        assert (when.hour, when.minute, when > datetime.now()) == (3, 0, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert store.learner().next_time is None
