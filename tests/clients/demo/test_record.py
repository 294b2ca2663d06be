import json
from pathlib import Path

import pytest
from prefloop.v1.chat_pb2 import FINISH_REASON_STOP

from clients.demo.plan import Plan, Work
from clients.demo.record import FinalError, Record
from clients.demo.voter import Answer

PLAN = Plan("short", 150, 64, 0, None)


def opened(directory: Path) -> Record:
    with Record.opened(directory, PLAN) as record:
        return record


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    record = opened(tmp_path / "demo")
    with record.step():
        record.before[3] = Answer("Yes.", FINISH_REASON_STOP, 2, "conv_1", "v0000")
        record.seconds_per_answer, record.work = 0.8, Work(32, 5)
        record.compared["Why?"] = "cmp_1"
        record.reports.append({"round_id": "round_1", "state": "rejected"})
    assert opened(tmp_path / "demo") == record
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == {
        "format": 1,
        "plan": {"taste": "short", "votes": 150, "held_out": 64, "seed": 0, "model": None},
        "seconds_per_answer": 0.8,
        "work": {"max_tokens": 32, "ppo_steps": 5},
        "before": {
            "3": {
                "text": "Yes.",
                "finish_reason": FINISH_REASON_STOP,
                "tokens": 2,
                "conversation_id": "conv_1",
                "policy_version": "v0000",
            }
        },
        "after": {},
        "forgotten": False,
        "compared": {"Why?": "cmp_1"},
        "reports": [{"round_id": "round_1", "state": "rejected"}],
        "streams": 0,
        "crossing": [],
        "seconds": {},
        "finished": False,
    }


def test_a_step_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    record = opened(tmp_path)
    with record.step():
        record.streams = 4
    with pytest.raises(TypeError), record.step():
        record.crossing.append(object())  # type: ignore[arg-type]
    assert (opened(tmp_path).streams, opened(tmp_path).crossing) == (4, [])


def test_a_stages_seconds_add_up_over_runs_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 13.0, 100.0, 104.0])
    monkeypatch.setattr("clients.demo.record.time.monotonic", lambda: next(now))
    with pytest.raises(KeyboardInterrupt), opened(tmp_path).stage("votes"):
        raise KeyboardInterrupt
    with opened(tmp_path).stage("votes"):
        pass
    assert opened(tmp_path).seconds == {"votes": 7.0}


def test_two_demos_cannot_have_one_directory(tmp_path: Path) -> None:
    with (
        Record.opened(tmp_path, PLAN),
        pytest.raises(FinalError, match=rf"^Another demo is running in {tmp_path}\.$"),
        Record.opened(tmp_path, PLAN),
    ):
        pass


def test_shorter_answers_take_less_time(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.seconds_per_answer, record.work = 0.8, Work(32)
    assert record.pace.seconds_per_answer == 0.4


def test_another_format_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    kept = json.loads((tmp_path / "demo.json").read_text())
    (tmp_path / "demo.json").write_text(json.dumps({**kept, "format": 2}))
    with pytest.raises(FinalError, match=rf"demo\.json cannot be read \(another format\); remove {tmp_path} to start"):
        opened(tmp_path)
