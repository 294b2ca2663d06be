"""`learner run-once` learns from demonstrations first, in a process of its own, and tells both outcomes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import learner.ops.imitate_first as first
from learner.ops.imitate_first import both, command, imitate_first
from learner.process import STOPPED
from learner.round.report import Report
from tests.learner.round.test_sft import demonstrate
from tests.learner.rounds import settings


def demonstrated(data_dir: Path) -> None:
    demonstrate(data_dir, 10)
    demonstrate(data_dir, 10, first=10, user="eve")


def program(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Makes the process run this instead; FILE is the report's path."""

    def instead(_: Any, report: Path) -> list[str]:
        return [sys.executable, "-c", f"FILE = {str(report)!r}\n{code}"]

    monkeypatch.setattr(first, "command", instead)


def test_it_runs_only_if_it_is_due(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("promoted", "v0001 is active.", "round_1", "v0001")
    program(monkeypatch, f"open(FILE, 'w').write({json.dumps(report.to_json())!r})")
    said: list[str] = []
    assert imitate_first(settings(tmp_path / "nowhere"), said.append) is None
    assert imitate_first(settings(data_dir), said.append) is None
    assert said == []
    demonstrated(data_dir)
    assert imitate_first(settings(data_dir), said.append) == report
    assert said == ["learning from demonstrations first"]
    assert imitate_first(settings(data_dir, sft={"min_new": 0}), said.append) is None


def test_a_failure_leaves_the_votes_to_be_learned_from(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrated(data_dir)
    program(monkeypatch, "raise SystemExit(3)")
    before = imitate_first(settings(data_dir), lambda _: None)
    assert before == Report("failed", "Learning from demonstrations ended with status 3.")


def test_a_stop_stops_it_too(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrated(data_dir)
    program(monkeypatch, f"raise SystemExit({STOPPED})")
    with pytest.raises(KeyboardInterrupt):
        imitate_first(settings(data_dir), lambda _: None)
    # As this process is asked to stop, so is that one.
    program(monkeypatch, "import time; time.sleep(60)")
    started: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], *arguments: Any) -> int:
        if process not in started:
            started.append(process)
            raise KeyboardInterrupt
        return wait(process, *arguments)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imitate_first(settings(data_dir), lambda _: None)
    assert started[0].returncode == -signal.SIGTERM


def test_its_command_has_the_settings_that_flags_changed(tmp_path: Path) -> None:
    given = settings(tmp_path, seed=7, policy={"train": "full"})
    assert command(given, tmp_path / "r.json")[2:] == [
        "learner.cli", "sft", "--wait", "--data-dir", str(tmp_path), "--train", "full", "--seed", "7",
        "--report", str(tmp_path / "r.json"),
    ]  # fmt: skip


def test_both_outcomes_are_told() -> None:
    imitated = Report("promoted", "v0001 is active.", "round_1", "v0001")
    learned = Report("rejected", "v0002 was not promoted.", "round_2", "v0002")
    nothing, failed = Report("nothing", "There are no votes yet."), Report("failed", "No memory.")
    assert both(None, learned) == both(nothing, learned) == learned
    assert both(imitated, nothing) == imitated
    found = both(imitated, learned)
    assert (found.state, found.round_id) == ("rejected", "round_2")
    assert found.sentence == "v0001 is active. v0002 was not promoted."
    assert both(failed, nothing).sentence == ("Learning from demonstrations failed: No memory. There are no votes yet.")
    assert both(imitated, failed).sentence == "v0001 is active. No memory."
