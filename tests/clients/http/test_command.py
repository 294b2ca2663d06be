"""The page's process: rejected setups, reaching and stopping it, and the processes it runs."""

import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from prefloop.v1 import account_pb2
from typer.testing import CliRunner

from clients import cli
from clients.http import command
from clients.http.command import Page, beside, run
from tests.clients.conftest import FakeService, serving
from tests.pem import Pem, make_pem

WAIT_SECONDS = 20
# An open event stream gets three seconds.
FEW_SECONDS = 8
SERVER = "127.0.0.1:50051"
PEM = {"cert": Path("tls.crt"), "key": Path("tls.key")}

# Reports its events to a FIFO; only the standard library is used, so that it starts fast.
STAND_IN = """
import os, signal, sys, time

def say(word):
    with open(os.environ["HEARD"], "w") as heard:
        heard.write(f"{name} {word}\\n")

def hear(number, frame):
    say(signal.Signals(number).name)
    if does != "ignore":
        # If a process is not waited for, another one's lines appear in between.
        time.sleep(0.3)
        say("ends")
        os._exit(0)

name, does = sys.argv[1:]
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, hear)
if does == "fork" and os.fork() == 0:
    held = open(os.environ["HELD"], "w")
    print(os.getpid(), file=held, flush=True)
    while True:
        signal.pause()
if does == "fork":
    does = "ignore"
say("starts")
if does.isdigit():
    sys.exit(int(does))
if does == "die":
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    signal.pause()
"""
# Stands in for the programs that `--serve` starts.
PROGRAM = """
import os, runpy, sys
arguments = sys.argv[1:]
assert arguments == {arguments}, arguments
sys.argv[1:] = ["{name}", os.environ.get("{name}", "stay")]
runpy.run_module("stand_in", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """A shell that runs the tests in the background may have set these signals to be ignored, also in children."""
    deaf = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN]
    for number in deaf:
        # Children do not inherit a handler, only SIG_IGN.
        signal.signal(number, lambda *_: None)
    yield
    for number in deaf:
        signal.signal(number, signal.SIG_IGN)


class Heard:
    """The lines that stand-ins have reported; a read waits for the next one."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        # Opened for writing too, so that it never reaches its end.
        self._file = os.fdopen(os.open(path, os.O_RDWR), "r+b", buffering=0)
        self._rest = b""

    def lines(self, count: int) -> list[str]:
        """The next `count` lines."""
        while self._rest.count(b"\n") < count:
            assert has_more(self._file), self._rest
            self._rest += self._file.read(4096)
        *lines, self._rest = self._rest.split(b"\n", count)
        return [line.decode() for line in lines]

    def all(self) -> list[str]:
        """All remaining lines, once nothing writes any more."""
        self._file.write(b".\n")
        found: list[str] = []
        while not found or found[-1] != ".":
            found += self.lines(1)
        return found[:-1]

    def close(self) -> None:
        self._file.close()


def has_more(file: IO[Any]) -> bool:
    """Waits for more data or the end of the file."""
    return bool(select.select([file], [], [], WAIT_SECONDS)[0])


@pytest.fixture
def heard(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    for name, arguments in (
        # The address that the page connects to, regardless of the server's own settings.
        ("server", ["serve", "--host", "127.0.0.1", "--port", "1"]),
        ("learner", ["schedule", "--on-request"]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "cli.py").write_text(PROGRAM.format(name=name, arguments=arguments))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, root, root / "proto"))))
    monkeypatch.setenv("HEARD", str(tmp_path / "heard"))
    # `python -m` searches the working directory first.
    monkeypatch.chdir(tmp_path)
    heard = Heard(tmp_path / "heard")
    yield heard
    heard.close()


@dataclass
class Started:
    """`chat web` as a separate process."""

    process: "subprocess.Popen[str]"
    url: str

    def ends(self, seconds: float = WAIT_SECONDS) -> int:
        return self.process.wait(seconds)

    def client(self, *, verify: ssl.SSLContext | bool = True, **headers: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers=headers, verify=verify, timeout=WAIT_SECONDS, trust_env=False, cookies=None
        )


@contextmanager
def started(
    *arguments: str, server: str = "127.0.0.1:1", terminal: bool = False, what: str = "web"
) -> Iterator[Started]:
    """Starts `chat web` or `chat gateway` on a free port; yields once it accepts connections."""
    host, _, port = server.partition(":")
    process = subprocess.Popen(
        [sys.executable, "-m", "clients.cli", "--host", host, "--port", port, what, "--web-port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=terminal,
    )
    watch = threading.Timer(WAIT_SECONDS * 2, process.kill)
    watch.start()
    assert process.stdout
    try:
        said = process.stdout.readline()
        found = re.fullmatch(r"(?:chat|gateway) on (https?://\S+:\d+)(?:/v1/)?\n", said)
        assert found, (said, process.stderr and process.stderr.read())
        yield Started(process, found[1])
    finally:
        watch.cancel()
        process.kill()
        process.communicate()


class Keyed(FakeService):
    """A server whose callers all have a key."""

    def GetCaller(self, request: Any, context: Any) -> account_pb2.GetCallerResponse:
        self._enter(request, context)
        return account_pb2.GetCallerResponse(user="ana", role="user", has_key=True)


@pytest.mark.parametrize(
    ("page", "server", "sentence"),
    [
        (
            Page("0.0.0.0", 8080, **PEM),
            SERVER,
            "chat: --web-host 0.0.0.0 admits strangers: pass the host name they use with --web-name.",
        ),
        (
            Page("0.0.0.0", 8080, ("chat.example.org",)),
            SERVER,
            "chat: --web-host 0.0.0.0 admits strangers, which requires --web-cert and --web-key.",
        ),
        (
            Page("::", 8080, ("chat.example.org",)),
            SERVER,
            "chat: --web-host :: admits strangers, which requires --web-cert and --web-key.",
        ),
        (Page("0.0.0.0", 8080, ("x",), PEM["cert"]), SERVER, "chat: --web-cert and --web-key must be given together."),
        (
            Page("127.0.0.1", 8080, (), None, PEM["key"]),
            SERVER,
            "chat: --web-cert and --web-key must be given together.",
        ),
        (
            Page("127.0.0.1", 8080, **PEM),
            SERVER,
            "chat: tls.crt and tls.key are not a certificate and its key (No such file or directory).",
        ),
        (
            Page("127.0.0.1", 8080),
            "0.0.0.0:50051",
            "chat: 0.0.0.0:50051 is only for listening: pass the name in the server's certificate with --web-server.",
        ),
        (
            Page("127.0.0.1", 8080),
            "[::]:50051",
            "chat: [::]:50051 is only for listening: pass the name in the server's certificate with --web-server.",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: Page, server: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        run(page, server, "ann", None, serve=False)
    assert refused.value.code == sentence


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as refused:
            run(Page("127.0.0.1", port), SERVER, "ann", None, serve=False)
    assert refused.value.code == (
        f"chat: 127.0.0.1:{port} cannot be used (Address already in use); choose another --web-port."
    )


def test_a_key_that_is_not_the_certificates_is_one_sentence(tmp_path: Path) -> None:
    pem, other = make_pem(tmp_path, "one"), make_pem(tmp_path, "other")
    with pytest.raises(SystemExit, match=r"other\.key are not a certificate and its key \(.+\)\.$"):
        run(Page("127.0.0.1", 0, (), pem.certificate, other.key), SERVER, "ann", None, serve=False)


def test_nobody_is_asked_for_the_password_of_a_key(tmp_path: Path) -> None:
    pem, key = make_pem(tmp_path, "tls"), tmp_path / "locked.key"
    lock = ["openssl", "pkcs8", "-topk8", "-in", pem.key, "-out", key, "-passout", "pass:secret"]
    subprocess.run(lock, check=True, capture_output=True, timeout=WAIT_SECONDS)
    process = subprocess.Popen(
        [sys.executable, "-m", "clients.cli", "web", "--web-cert", pem.certificate, "--web-key", key],
        # Without a terminal OpenSSL would prompt on standard input, which stays silent.
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            assert process.wait(WAIT_SECONDS) == 1
            assert process.stderr
            assert b"locked.key are not a certificate and its key (" in process.stderr.read()
        finally:
            process.kill()


def told(monkeypatch: pytest.MonkeyPatch, *arguments: str, **environment: str) -> tuple[Any, ...]:
    """The arguments that `chat web` passes to `run`."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(command, "run", lambda *arguments, serve, gateway_alone: calls.append(arguments))
    for name in [name for name in os.environ if name.startswith("PREFLOOP_")]:
        monkeypatch.delenv(name)
    result = CliRunner().invoke(cli.app, ["web", *arguments], env={"LOGNAME": "ana", **environment})
    assert result.exit_code == 0, result.output
    return calls[0]


def test_alone_it_is_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch) == (Page("127.0.0.1", 8080), "127.0.0.1:50051", "ana", None)


def test_one_environment_is_for_the_server_and_for_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """PREFLOOP_HOST is the address that the server listens on."""
    page, address, name, _ = told(
        monkeypatch,
        PREFLOOP_HOST="0.0.0.0",
        PREFLOOP_PORT="50061",
        PREFLOOP_TLS_CERT="server.crt",
        PREFLOOP_WEB_HOST="0.0.0.0",
        PREFLOOP_WEB_PORT="8443",
        PREFLOOP_WEB_NAME="chat.example.org www.example.org",
        PREFLOOP_WEB_CERT="tls.crt",
        PREFLOOP_WEB_KEY="tls.key",
        PREFLOOP_WEB_SERVER="chat.example.org",
    )
    assert address == "chat.example.org:50061"
    assert page == Page("0.0.0.0", 8443, ("chat.example.org", "www.example.org"), Path("tls.crt"), Path("tls.key"))
    # Strangers have only the name that belongs to their key.
    assert name == ""


def test_allowed_origins_are_the_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    page, *_ = told(monkeypatch, PREFLOOP_WEB_ORIGIN="https://a.example https://b.example")
    assert page.origins == ("https://a.example", "https://b.example")


def test_the_gateway_is_beside_the_page_or_alone(service: FakeService) -> None:
    with serving(service) as port:
        for what, statuses in [("web", [200, 200, 404]), ("gateway", [404, 200, 404])]:
            with started(server=f"127.0.0.1:{port}", what=what) as process, process.client() as http:
                paths = ("/static/page.css", "/v1/models", "/v1/other")
                assert [http.get(path).status_code for path in paths] == statuses
                # Each refuses in its own shape.
                assert http.get("/v1/other").json()["error"]["code"] == "unknown_url"
                assert (
                    http.get("/other")
                    .headers["content-type"]
                    .startswith("text/html" if what == "web" else "application/json")
                )


def test_the_port_that_it_got_is_printed_and_served() -> None:
    with started() as page, page.client() as http:
        port = int(page.url.removeprefix("http://127.0.0.1:"))
        assert port > 0
        assert http.get("/static/page.css").status_code == 200
        # There is no server.
        assert http.get("/").status_code == 503


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_the_other_loopback() -> None:
    with started("--web-host", "::1") as page, page.client() as http:
        assert page.url.startswith("http://[::1]:")
        assert http.get("/static/page.css").status_code == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_every_address_is_both_kinds() -> None:
    with command.listen(Page("::", 0)) as listening:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listening.getsockname()[1]), timeout=WAIT_SECONDS).close()


@pytest.mark.parametrize("line", [b"a: b\r\n", b"a: " + b"b" * 1000, b"\r\n"], ids=["many", "one", "before them"])
def test_headers_without_end_are_not_kept(line: bytes) -> None:
    with started() as page, page.client() as http:
        port = int(page.url.removeprefix("http://127.0.0.1:"))
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"[: 0 if line == b"\r\n" else None])
            # Far above the limit; the page closes the connection long before the end.
            with pytest.raises(ConnectionError):
                connection.sendall(line * (64 * 2**20 // len(line)))
        assert http.get("/static/page.css").status_code == 200
        assert psutil.Process(page.process.pid).memory_info().rss < 200 * 2**20


@pytest.mark.parametrize("names", [["--web-name", "Chat.Example.org"], []], ids=["strangers", "this machine"])
def test_a_cookie_of_strangers_is_for_tls_alone(names: list[str]) -> None:
    with (
        serving(Keyed()) as port,
        started(*names, server=f"127.0.0.1:{port}") as page,
        page.client(host="chat.example.org" if names else "localhost") as http,
    ):
        response = http.post("/sign-in", data={"key": "key_1.secret"})
        assert response.status_code == 303
        [cookie] = [value for value in response.headers.get_list("set-cookie") if "key_1.secret" in value]
        assert cookie.startswith("__Host-prefloop_key=" if names else "prefloop_key=")
        # The attributes that the prefix requires.
        assert "; Path=/" in cookie
        assert "domain" not in cookie.lower()
        assert ("; Secure" in cookie) == bool(names)
        assert "; HttpOnly" in cookie
        assert http.get("/sign-in", headers={"host": "other.example.org"}).status_code == 400


def test_a_server_without_keys_is_refused_to_strangers() -> None:
    with (
        serving(FakeService()) as port,
        started("--web-name", "chat.example.org", server=f"127.0.0.1:{port}") as page,
        page.client(host="chat.example.org") as http,
    ):
        response = http.post("/sign-in", data={"name": "ann"})
        assert response.status_code == 403
        assert (
            "Strangers can reach this page, but the server has no keys to identify them: create one with "
            "`server keys create --user NAME`."
        ) in response.text
        assert "set-cookie" not in response.headers


def trusting(pem: Pem) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(pem.certificate))


def test_its_certificate_is_renewed_while_it_runs(tmp_path: Path) -> None:
    pem, second = make_pem(tmp_path, "tls"), make_pem(tmp_path, "second")
    first, new = trusting(pem), trusting(second)
    with started("--web-cert", str(pem.certificate), "--web-key", str(pem.key)) as page:
        assert page.url.startswith("https://127.0.0.1:")
        page.url = page.url.replace("127.0.0.1", "localhost")

        def status(context: ssl.SSLContext) -> int:
            with page.client(verify=context) as http:
                return http.get("/static/page.css").status_code

        assert status(first) == 200
        second.certificate.rename(pem.certificate)
        # The new key is not there yet.
        assert status(first) == 200
        second.key.rename(pem.key)
        assert status(new) == 200
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            status(first)
        pem.key.unlink()
        assert status(new) == 200
        page.process.terminate()
        assert page.ends() == 0
        assert page.process.stderr
        said = page.process.stderr.read().splitlines()
    before = "the page's new certificate cannot be loaded, the previous one stays in use: "
    assert [line.startswith(before) for line in said] == [True, True], said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_within_a_few_seconds_while_a_page_follows_an_answer(number: signal.Signals) -> None:
    service = FakeService()
    service.hold.clear()
    with serving(service) as port, started(server=f"127.0.0.1:{port}") as page, page.client() as http:
        assert http.post("/messages", data={"message": "Where do owls live?"}).headers["location"] == "/c/conv"
        with http.stream("GET", "/c/conv/answer") as answer:
            # Tells a proxy in front not to buffer the stream.
            assert answer.headers["x-accel-buffering"] == "no"
            assert answer.headers["cache-control"] == "no-store"
            lines = answer.iter_lines()
            assert next(lines) == "event: turn"
            page.process.send_signal(number)
            assert page.ends(FEW_SECONDS) == 0
        assert service.cancelled.wait(WAIT_SECONDS)


def test_it_ends_within_a_few_seconds_while_a_call_is_not_answered() -> None:
    service = FakeService()
    service.hold.clear()
    with serving(service) as port, started(server=f"127.0.0.1:{port}") as page:
        http = urlsplit(page.url)
        with socket.create_connection((str(http.hostname), http.port or 0), timeout=WAIT_SECONDS) as browser:
            browser.sendall(b"GET /c/conv HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert service.begun.acquire(timeout=WAIT_SECONDS)
            page.process.terminate()
            assert page.ends(FEW_SECONDS) == 0


def test_what_runs_beside_it_is_ended_one_after_the_other(heard: Heard) -> None:
    commands = (["stand_in", "first", "stay"], ["stand_in", "second", "stay"])
    with beside(commands, lambda: None) as ended:
        assert sorted(heard.lines(2)) == ["first starts", "second starts"]
    assert heard.all() == ["second SIGTERM", "second ends", "first SIGTERM", "first ends"]
    # None of them ended by itself.
    assert ended == []


@pytest.mark.parametrize(("does", "status"), [("0", 0), ("7", 7), ("die", 137)])
def test_one_that_ends_by_itself_is_told_of(heard: Heard, does: str, status: int) -> None:
    told = threading.Event()
    with beside((["stand_in", "first", "stay"], ["stand_in", "second", does]), told.set) as ended:
        assert sorted(heard.lines(2)) == ["first starts", "second starts"]
        assert told.wait(WAIT_SECONDS)
        assert ended == [status]
    assert heard.all() == ["first SIGTERM", "first ends"]
    assert ended == [status]


def test_one_that_does_not_end_is_killed_with_its_own_processes(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "STOP_SECONDS", 0.2)
    monkeypatch.setenv("HELD", str(tmp_path / "held"))
    os.mkfifo(tmp_path / "held")
    with beside((["stand_in", "first", "fork"],), lambda: None):
        assert heard.lines(1) == ["first starts"]
        # Opens once its child holds the other end.
        held = (tmp_path / "held").open("rb", buffering=0)
        child = int(held.readline())
    assert heard.all() == ["first SIGTERM"]
    try:
        # The pipe reaches its end when the last process that holds it ends.
        assert has_more(held)
        assert held.read() == b""
    finally:
        held.close()
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_where_one_cannot_be_started_none_is_left(heard: Heard) -> None:
    def not_started() -> None:
        with beside((["stand_in", "first", "stay"], ["no\0name"]), lambda: None):
            pytest.fail("the block must not run")

    before = {thread.ident for thread in threading.enumerate()}
    with pytest.raises(ValueError, match="null byte"):
        not_started()
    assert {thread.ident for thread in threading.enumerate()} <= before


def test_sigterm_ends_the_learner_before_the_server(heard: Heard) -> None:
    with started("--serve") as page:
        assert sorted(heard.lines(2)) == ["learner starts", "server starts"]
        page.process.terminate()
        assert page.ends() == 0
    assert heard.all() == ["learner SIGTERM", "learner ends", "server SIGTERM", "server ends"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["Ctrl-C", "the end of the terminal"])
def test_what_a_terminal_sends_reaches_them_once_and_in_order(heard: Heard, number: signal.Signals) -> None:
    with started("--serve", terminal=True) as page:
        assert sorted(heard.lines(2)) == ["learner starts", "server starts"]
        os.killpg(page.process.pid, number)
        assert heard.lines(1) == ["learner SIGTERM"]
        # While the learner is still stopping: the page must neither abandon the server nor hurry.
        os.killpg(page.process.pid, number)
        assert page.ends() == 0
    assert heard.all() == ["learner ends", "server SIGTERM", "server ends"]


@pytest.mark.parametrize(("name", "other"), [("server", "learner"), ("learner", "server")])
def test_where_one_of_them_fails_all_end_with_its_status(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, name: str, other: str
) -> None:
    monkeypatch.setenv(name, "3")
    with started("--serve") as page:
        assert page.ends() == 3
        assert page.process.stderr
        assert page.process.stderr.read() == ""
    found = heard.all()
    assert f"{name} starts" in found
    # The list is empty if it was stopped before it had installed its handlers.
    assert [line for line in found if line.startswith(other) and "starts" not in line] in (
        [f"{other} SIGTERM", f"{other} ends"],
        [],
    )


def test_they_are_waited_for_longer_than_they_take() -> None:
    from learner.ops.schedule import STOP_SECONDS
    from server.settings import ServerSettings

    assert command.STOP_SECONDS > STOP_SECONDS
    # After the grace period the engine has ten seconds to end.
    assert ServerSettings.model_fields["grace_seconds"].default + 10 <= command.STOP_SECONDS
