import subprocess
from pathlib import Path
from typing import Any

import pytest

from clients.demo.machine import Machine, look, read
from tests.clients.demo.world import DOCTOR

NOTHING = Machine([], None)


def test_what_the_doctor_finds_is_told_and_its_speed_taken() -> None:
    slow, memory = "This machine has one core: everything takes longer.", "A round needs 6 GiB."
    assert read(DOCTOR) == Machine([slow, memory], 64 / 100)
    assert read({**DOCTOR, "slow_reason": None, "tokens_per_second": None}) == Machine(
        [memory, "The disk is slow."], None
    )


def test_a_good_machine_has_nothing_to_tell() -> None:
    assert read({**DOCTOR, "slow_reason": None, "findings": []}) == Machine([], 0.64)


@pytest.mark.parametrize("said", ["", "No such command 'doctor'.", "[]", '{"findings": []}'])
def test_where_there_is_no_doctor_nothing_is_known(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 2, stdout=said)

    monkeypatch.setattr(subprocess, "run", run)
    assert look(Path("data"), None) == NOTHING


def test_a_doctor_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], timeout: float, **_: Any) -> None:
        asked.append(command[1:])
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert look(Path("data"), "a/model") == NOTHING
    assert asked == [["-m", "server.cli", "doctor", "--json", "--data-dir", "data", "--model", "a/model"]]
