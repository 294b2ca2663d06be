"""Reduced work on a slow machine."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from clients import Client
from clients.demo import loop as module
from clients.demo import rounds
from clients.demo.loop import Loop
from clients.demo.plan import Plan, Work
from clients.demo.processes import DemoError, Server
from clients.demo.record import Record
from tests.clients.conftest import FakeService


class RunningServer:
    """A server that never ends."""

    def check(self) -> None:
        return


SERVER = cast("Server", RunningServer())


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    with Record.opened(tmp_path / "demo", Plan("short", 20, 20, 0, None)) as record:
        yield record


def test_a_machine_that_is_asked_for_less_is_asked_again_from_the_first_question(
    client: Client, service: FakeService, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []

    def work_for(seconds_per_answer: float) -> Work:
        measured.append(seconds_per_answer)
        return Work(max_tokens=32, ppo_steps=4)

    monkeypatch.setattr(module, "work_for", work_for)
    Loop(record, Console(file=io.StringIO()), SERVER, client).ask_before()
    assert [request.sampling.max_tokens for request in service.sent("Chat")] == [64] * 16 + [32] * 20
    assert len(measured) == 1
    assert (record.seconds_per_answer, record.work) == (measured[0], Work(32, 4))
    assert sorted(record.before) == list(range(20))
    # All answers are deleted from the history; the scripted server lists two pages of one conversation each.
    assert [request.conversation_id for request in service.sent("DeleteConversation")] == ["newer", "older"]


@pytest.mark.parametrize(("work", "flags"), [(Work(), []), (Work(64, 4), ["--steps", "4"])])
def test_the_learner_is_told_of_fewer_steps_and_of_nothing_else(
    client: Client, record: Record, monkeypatch: pytest.MonkeyPatch, work: Work, flags: list[str]
) -> None:
    commands: list[list[str]] = []

    class Learner:
        def __init__(self, command: list[str], *_: Any) -> None:
            commands.append(command)
            Path(command[command.index("--report") + 1]).write_text(
                json.dumps({"sentence": "There are no new votes."}), encoding="utf-8"
            )

        def ended(self, seconds: float) -> bool:
            return True

        def stop(self) -> int:
            return 0

    monkeypatch.setattr(rounds, "Process", Learner)
    record.seconds_per_answer, record.work = 0.1, work
    with pytest.raises(DemoError, match=r"^The learner learned nothing: There are no new votes\.$"):
        rounds.learn(record, Console(file=io.StringIO()), SERVER, client)
    report = ["--wait", "--report", str(record.directory / "demo-round.json")]
    assert commands == [["learner.cli", "run-once", "--data-dir", str(record.directory), *report, *flags]]
