import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.cli import main
from tests.clients.conftest import FakeService

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `chat` in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chat", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        if isinstance(ended.value.code, str):
            return 1, out, err + ended.value.code
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def port(address: str) -> str:
    return address.rpartition(":")[2]


def test_send_prints_the_answer_and_nothing_else(run: Run, port: str) -> None:
    assert run("send", "Where do owls live?", "--port", port) == (0, "Owls live in trees.\n", "")


def test_options_may_stand_before_the_command_or_in_the_environment(
    run: Run, port: str, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--port", port, "--user", "ben", "send", "hi")[0] == 0
    monkeypatch.setenv("PREFLOOP_PORT", port)
    monkeypatch.setenv("PREFLOOP_USER", "eve")
    assert run("send", "hi")[0] == 0
    assert [metadata["x-user-id"] for metadata in service.metadata] == ["ben", "eve"]


def test_a_key_comes_from_the_environment(
    run: Run, port: str, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFLOOP_API_KEY", "key_1.secret")
    assert run("send", "hi", "--port", port)[0] == 0
    assert service.metadata[-1]["authorization"] == "Bearer key_1.secret"


def test_a_file_that_is_no_certificate_is_one_sentence(run: Run, port: str, tmp_path: Path) -> None:
    code, _, err = run("send", "hi", "--port", port, "--ca", str(tmp_path / "none"))
    assert code == 2
    assert "No such file" in err


def test_send_reads_standard_input_and_prints_json(run: Run, port: str, service: FakeService) -> None:
    code, out, _ = run("send", "-", "--json", "--port", port, "--seed", "0", stdin="Where do\nowls live?\n")
    assert code == 0
    assert json.loads(out) == {
        "conversation_id": "conv",
        "response_id": "resp",
        "text": "Owls live in trees.",
        "finish_reason": "FINISH_REASON_STOP",
        "policy_version": "v0001",
        "prompt_tokens": 5,
        "completion_tokens": 6,
    }
    assert service.sent("Chat")[0].message == "Where do\nowls live?\n"


def test_a_session_from_a_pipe(run: Run, port: str) -> None:
    code, out, _ = run("--port", port, stdin="Where do owls live?\n/up\n")
    assert code == 0
    assert "Owls live in trees." in out
    assert "thumb up, kept" in out


@pytest.mark.parametrize("arguments", [(), ("send", "hi")])
def test_without_a_server_it_says_what_to_do(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run("--port", "1", *arguments)
    assert (code, out) == (1, "")
    assert err.strip() == (
        "chat: No server answers at 127.0.0.1:1: start one with `server serve`, or give its --host and --port."
    )


def test_help_comes_at_once() -> None:
    started = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-m", "clients.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
    )
    took = time.monotonic() - started
    assert re.search(r"--host\b", shown.stdout)
    # Alone it takes half a second; the rest is room for a busy machine.
    assert took < 5
