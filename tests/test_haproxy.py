"""The proxy's example is tried: calls go to servers that serve, and a stop breaks none."""

import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from prefloop.v1.chat_pb2 import ChatDelta

from clients import AsyncClient
from clients.channel import Tls
from clients.errors import InvalidRequestError
from server.telemetry.metrics_http import MetricsServer
from tests.pem import make_pem
from tests.ports import free_port, wait_until_open
from tests.server.conftest import Running, running_server
from tests.server.test_votes_app import votes_server

SECONDS = 30
# The last two take votes.
ADDRESSES = tuple(f"10.0.0.{number}:50051" for number in range(11, 16))


@pytest.fixture
async def five(tmp_path: Path) -> AsyncIterator[list[Running]]:
    """Three that answer, and two that take votes."""
    pem = make_pem(tmp_path, "server")
    tls = {"tls_cert": pem.certificate, "tls_key": pem.key}
    async with AsyncExitStack() as stack:
        three = [await stack.enter_async_context(running_server(tmp_path, **tls)) for _ in range(3)]
        yield [*three, *[await stack.enter_async_context(votes_server(tmp_path, **tls)) for _ in range(2)]]


def configuration(root: Path, folder: Path, port: int, servers: list[tuple[int, int]]) -> Path:
    """The example with this machine's ports and certificates. `servers` are ports of gRPC and of /healthz."""
    front = make_pem(folder, "front")
    (folder / "chat.pem").write_bytes(front.certificate.read_bytes() + front.key.read_bytes())
    text = (root / "deploy" / "haproxy.cfg").read_text()
    for old, new in [
        ("bind :443 ", f"bind 127.0.0.1:{port} "),
        ("/etc/prefloop/chat.pem", str(folder / "chat.pem")),
        *((old, f"127.0.0.1:{grpc} port {health}") for old, (grpc, health) in zip(ADDRESSES, servers, strict=True)),
    ]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    text = text.replace("/etc/prefloop/ca.pem", str(folder / "server.crt"))
    (folder / "haproxy.cfg").write_text(text)
    return folder / "haproxy.cfg"


@contextmanager
def proxy(root: Path, folder: Path, ports: list[tuple[int, int]]) -> Iterator[int]:
    """A proxy before these servers; yields its port."""
    haproxy = shutil.which("haproxy")
    if haproxy is None:
        pytest.skip("haproxy is not installed")
    port = free_port()
    process = subprocess.Popen([haproxy, "-db", "-q", "-f", str(configuration(root, folder, port, ports))])
    try:
        wait_until_open(port, process)
        yield port
    finally:
        process.kill()
        process.wait(SECONDS)


@asynccontextmanager
async def proxied(root: Path, tmp_path: Path, servers: list[Running]) -> AsyncIterator[AsyncClient]:
    """A client of a proxy before these servers."""
    health = [MetricsServer("127.0.0.1", 0, lambda running=running: running.app.serving) for running in servers]
    ports = [(running.app.port, checked.port) for running, checked in zip(servers, health, strict=True)]
    try:
        with proxy(root, tmp_path, ports) as port:
            tls = Tls(ca=(tmp_path / "front.crt").read_bytes())
            async with AsyncClient(f"localhost:{port}", user="ann", tls=tls, patience=SECONDS) as client:
                yield client
    finally:
        for each in health:
            each.close()


async def test_calls_go_to_servers_that_serve_and_a_stop_breaks_none(
    root: Path, tmp_path: Path, five: list[Running]
) -> None:
    three = five[:3]
    async with proxied(root, tmp_path, five) as client:

        async def answers(number: int) -> list[int]:
            before = [len(running.engine.streams) for running in three]
            for _ in range(number):
                said = [event.text async for event in client.chat("hello") if isinstance(event, ChatDelta)]
                assert said == ["one ", "two ", "three ", "four "]
            return [len(running.engine.streams) - n for running, n in zip(three, before, strict=True)]

        assert min(await answers(30)) >= 5
        await three[0].app.stop(SECONDS)
        assert (await answers(20))[0] == 0


async def test_votes_go_to_the_servers_for_them_while_there_is_one(
    root: Path, tmp_path: Path, five: list[Running]
) -> None:
    async with proxied(root, tmp_path, five) as client:
        [started, *_] = [event async for event in client.chat("hello")]
        # They alone have so short a limit.
        for votes in five[3:]:
            votes.engine.max_model_len = 4
        for votes in five[3:]:
            with pytest.raises(InvalidRequestError, match="text must have at most"):
                await client.correct(started.response_id, "one two three four five six seven")
            await votes.app.stop(SECONDS)
        await client.correct(started.response_id, "one two three four five six seven")
