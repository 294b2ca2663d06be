import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from prefloop.v1.chat_pb2 import COMPARISON_STATE_OPEN, FINISH_REASON_STOP, Comparison, Response, Turn
from prefloop.v1.feedback_pb2 import CHOICE_B

from clients.cli import main
from tests.clients.conftest import ANSWERED, FakeService, serving, status
from tests.pem import make_pem

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `chat` in this process; returns (exit code, standard output, standard error)."""

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
    assert "thumb up, saved" in out


@pytest.mark.parametrize(("arguments", "asked"), [(("--resume",), "newer"), (("--conversation", "older"), "older")])
def test_a_session_goes_on_with_a_conversation(
    run: Run, port: str, service: FakeService, arguments: tuple[str, ...], asked: str
) -> None:
    service.conversation.turns.append(ANSWERED)
    code, out, _ = run("--port", port, *arguments, stdin="And bats?\n/up\n")
    assert code == 0
    assert "> Where do owls live?\nOwls live in trees.\n" in out
    assert service.sent("GetConversation")[0].conversation_id == asked
    assert service.sent("Chat")[0].conversation_id == "conv"


def test_a_session_that_goes_on_asks_for_the_choice_that_is_open(run: Run, port: str, service: FakeService) -> None:
    a, b = (Response(response_id=f"resp{slot}", finish_reason=FINISH_REASON_STOP) for slot in (1, 2))
    comparison = Comparison(comparison_id="cmp", state=COMPARISON_STATE_OPEN, a=a, b=b)
    service.conversation.turns.append(Turn(message="fish?", comparison=comparison))
    run("--port", port, "--resume", stdin="b\n")
    assert [(vote.comparison_id, vote.choice) for vote in service.sent("SubmitChoice")] == [("cmp", CHOICE_B)]


def test_there_may_be_nothing_to_go_on_with(
    run: Run, port: str, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.fail["GetConversation"] = [status(grpc.StatusCode.NOT_FOUND, "There is no conversation 'x'.")]
    assert run("--port", port, "--conversation", "x")[::2] == (1, "chat: There is no conversation 'x'.")
    assert run("--port", port, "--conversation", "x", "--resume")[0] == 2
    monkeypatch.setattr("clients.client.Client.conversations", lambda client: iter(()))
    assert run("--port", port, "--resume", stdin="hi\n")[0] == 0
    assert service.sent("Chat")[0].conversation_id == ""


def test_a_server_may_ask_for_a_certificate(
    run: Run, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, mine = make_pem(tmp_path, "own"), make_pem(tmp_path, "mine")
    pair = (own.key.read_bytes(), own.certificate.read_bytes())
    with serving(service, grpc.ssl_server_credentials([pair], mine.certificate.read_bytes(), True)) as port:
        send = ["send", "hi", "--host", "localhost", "--port", str(port), "--ca", str(own.certificate)]
        flags = ["--cert", str(mine.certificate), "--key", str(mine.key)]
        assert run(*send, *flags) == (0, "Owls live in trees.\n", "")
        assert run(*send)[0] == 1
        code, _, err = run(*send, *flags[:2])
        assert code == 2
        assert "must be given together" in err
        monkeypatch.setenv("PREFLOOP_CLIENT_CERT", str(mine.certificate))
        monkeypatch.setenv("PREFLOOP_CLIENT_KEY", str(mine.key))
        assert run(*send)[0] == 0


@pytest.mark.parametrize("arguments", [(), ("send", "hi")])
def test_without_a_server_it_says_what_to_do(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run("--port", "1", *arguments)
    assert (code, out) == (1, "")
    assert err.strip() == (
        "chat: No server answers at 127.0.0.1:1: start one with `server serve`, or pass its --host and --port."
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
    # It takes half a second on an idle machine.
    assert took < 5
