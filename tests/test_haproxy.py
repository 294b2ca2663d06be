"""The proxy's example is tried: calls go to servers that serve, and a stop breaks none."""

import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prefloop.v1.chat_pb2 import ChatDelta

from clients import AsyncClient
from clients.channel import Tls
from server.telemetry.metrics_http import MetricsServer
from tests.pem import make_pem
from tests.ports import free_port, wait_until_open
from tests.server.conftest import Running, running_server

SECONDS = 30
ADDRESSES = ("10.0.0.11:50051", "10.0.0.12:50051", "10.0.0.13:50051")


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[list[Running]]:
    pem = make_pem(tmp_path, "server")
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running_server(tmp_path, tls_cert=pem.certificate, tls_key=pem.key))
            for _ in range(3)
        ]


def configuration(root: Path, folder: Path, port: int, servers: list[tuple[int, int]]) -> Path:
    """The example with this machine's ports and certificates. `servers` are ports of gRPC and of /healthz."""
    front = make_pem(folder, "front")
    (folder / "chat.pem").write_bytes(front.certificate.read_bytes() + front.key.read_bytes())
    text = (root / "deploy" / "haproxy.cfg").read_text()
    for old, new in [
        ("bind :443 ", f"bind 127.0.0.1:{port} "),
        ("/etc/prefloop/chat.pem", str(folder / "chat.pem")),
        ("/etc/prefloop/ca.pem", str(folder / "server.crt")),
        *((old, f"127.0.0.1:{grpc} port {health}") for old, (grpc, health) in zip(ADDRESSES, servers, strict=True)),
    ]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "haproxy.cfg").write_text(text)
    return folder / "haproxy.cfg"


async def test_calls_go_to_servers_that_serve_and_a_stop_breaks_none(
    root: Path, tmp_path: Path, three: list[Running]
) -> None:
    haproxy = shutil.which("haproxy")
    if haproxy is None:
        pytest.skip("haproxy is not installed")
    health = [MetricsServer("127.0.0.1", 0, lambda running=running: running.app.serving) for running in three]
    port = free_port()
    ports = [(running.app.port, checked.port) for running, checked in zip(three, health, strict=True)]
    process = subprocess.Popen([haproxy, "-db", "-q", "-f", str(configuration(root, tmp_path, port, ports))])
    try:
        wait_until_open(port, process)
        tls = Tls(ca=(tmp_path / "front.crt").read_bytes())
        async with AsyncClient(f"localhost:{port}", user="ann", tls=tls, patience=SECONDS) as client:

            async def answers(number: int) -> list[int]:
                before = [len(running.engine.streams) for running in three]
                for _ in range(number):
                    said = [event.text async for event in client.chat("hello") if isinstance(event, ChatDelta)]
                    assert said == ["one ", "two ", "three ", "four "]
                return [len(running.engine.streams) - n for running, n in zip(three, before, strict=True)]

            assert min(await answers(30)) >= 5
            await three[0].app.stop(SECONDS)
            assert (await answers(20))[0] == 0
    finally:
        process.kill()
        process.wait(SECONDS)
        for each in health:
            each.close()
