"""A candidate that fails an operator's checks is not promoted, and the report says which."""

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import learner.round.gate.gate_stage as judging
from learner.gate.checks import Check, CheckedAnswer
from learner.round.gate.checks_stage import compare
from learner.round.report import print_report
from server.store.store import Store
from tests.learner.rounds import passing, run, waiting

pytestmark = pytest.mark.usefixtures("engine")

ANY, NONE = "(?s).*", "w999"


def checks(tmp_path: Path, *lines: dict[str, Any], **more: Any) -> dict[str, Any]:
    file = tmp_path / "checks.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"file": file, **more}


def command(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


# The answers of a random model never have w999, a word outside of its vocabulary.
PASSES = {"name": "anything", "prompt": "a", "must": [ANY], "must_not": [NONE]}
FAILS = {"name": "the impossible", "prompt": "b", "must": [NONE]}


def test_a_candidate_that_passes_is_promoted(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    report = run(data_dir, checks=checks(tmp_path, PASSES, command=command("print(1)")))
    assert report.state == "promoted"
    assert report.metrics.gate
    assert report.metrics.gate.checks
    assert str(report.metrics.gate.checks) == "1 of 1 passed (the incumbent: 1), score 1 (1)"


@pytest.mark.parametrize("verdict", [passing, waiting])
def test_a_candidate_that_fails_is_neither_promoted_nor_a_canary(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: Any
) -> None:
    monkeypatch.setattr(judging, "decide", verdict)
    report = run(data_dir, checks=checks(tmp_path, PASSES, FAILS))
    assert report.state == "rejected"
    assert "It fails 1 of 2 checks: the impossible (has nothing like 'w999')." in report.sentence
    gate = report.metrics.gate
    assert gate
    assert gate.checks
    [failed] = gate.checks.failed
    assert (failed.name, failed.incumbent_failed, gate.checks.incumbent_failed) == ("the impossible", True, 1)
    printed = io.StringIO()
    print_report(report, Console(file=printed, width=200))
    assert "1 of 2 passed (the incumbent: 1)" in printed.getvalue()
    store = Store.open(data_dir)
    assert store.policies.active().version == "v0000"
    assert store.canaries.waiting() is None
    store.close()


# Counts the calls, so that the candidate's score, the second, is lower.
WORSE = (
    "import pathlib, sys; f = pathlib.Path(sys.argv[1]); f.write_text(f.read_text() + 'x'); print(-len(f.read_text()))"
)


def test_a_lower_score_than_the_incumbents_is_refused(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    counted = tmp_path / "calls"
    counted.write_text("")
    worse = f"{command(WORSE)} {counted}"
    report = run(data_dir, checks=checks(tmp_path, PASSES, command=worse))
    assert report.state == "rejected"
    assert "Its answers score -2 in the check, less than -1." in report.sentence


@pytest.mark.parametrize(
    ("code", "least", "said"),
    [
        ("print(0.4)", 0.5, "Its answers score 0.4 in the check, less than 0.5."),
        ("raise SystemExit('no disk')", None, "exited with 1: no disk."),
    ],
)
def test_a_low_score_or_none_is_refused(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, least: float | None, said: str
) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    report = run(data_dir, checks=checks(tmp_path, PASSES, command=command(code), min_score=least))
    assert report.state == "rejected"
    assert said in report.sentence


def test_a_file_that_cannot_be_read_ends_a_round_before_it_begins(data_dir: Path, tmp_path: Path) -> None:
    report = run(data_dir, checks={"file": tmp_path / "typo.jsonl"})
    assert report.state == "nothing"
    assert report.sentence.startswith("checks.file cannot be read: [Errno 2]")
    report = run(data_dir, checks=checks(tmp_path, {"prompt": "a", "must": ["("]}))
    assert "line 1: must.0" in report.sentence
    assert report.sentence.endswith("Nothing was changed.")


def test_what_the_incumbent_fails_too_is_told_from_what_is_new() -> None:
    both = Check(name="both", prompt="a", must=("x",)), Check(name="new", prompt="b", must=("y",))
    before = [CheckedAnswer("both", "a", "-"), CheckedAnswer("new", "b", "y")]
    after = [CheckedAnswer("both", "a", "-"), CheckedAnswer("new", "b", "-")]
    found = compare(list(both), before, after)
    assert [(one.name, one.incumbent_failed) for one in found.failed] == [("both", True), ("new", False)]
    assert (found.checks, found.incumbent_failed) == (2, 1)
