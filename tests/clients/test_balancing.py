"""One client, several servers: calls go to all that serve, and to no other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prefloop.v1.chat_pb2 import ChatDelta

from clients import AsyncClient
from clients.channel import channel_target, on_loopback, open_channel
from server.grpc_server import NOT_SERVING
from tests.server.conftest import Running, running_server

SECONDS = 30


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[list[Running]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running_server(tmp_path)) for _ in range(3)]


async def answers(client: AsyncClient, three: list[Running], number: int) -> list[int]:
    """How many of so many messages each server answered."""
    before = [len(running.engine.streams) for running in three]
    for _ in range(number):
        said = [event.text async for event in client.chat("hello there") if isinstance(event, ChatDelta)]
        assert said == ["one ", "two ", "three ", "four "]
    return [len(running.engine.streams) - count for running, count in zip(three, before, strict=True)]


async def test_calls_go_round_all_servers_that_serve(three: list[Running]) -> None:
    address = ",".join(f"127.0.0.1:{running.app.port}" for running in three)
    async with AsyncClient(address, user="ann") as client:
        first = await answers(client, three, 30)
        assert min(first) >= 8, first
        # It says that it does not serve, and is asked nothing more once that has arrived.
        await three[1].app._health.set("", NOT_SERVING)
        async with asyncio.timeout(SECONDS):
            while (await answers(client, three, 4))[1]:
                pass
        assert (await answers(client, three, 20))[1] == 0
        await three[0].app.stop(0)
        assert await answers(client, three, 10) == [0, 0, 10]


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("dns:///chat.example:443", "dns:///chat.example:443"),
        ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("[::1]:1,[::2]:2", "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_the_target_of_one_or_several_servers(address: str, target: str) -> None:
    assert channel_target(address) == target


@pytest.mark.parametrize("address", ["a.example:1,b.example:1", "127.0.0.1:1,[::1]:1", "127.0.0.1:1,"])
def test_what_is_no_list_of_servers(address: str) -> None:
    with pytest.raises(ValueError, match="give"):
        channel_target(address)


def test_one_server_beyond_loopback_among_several_needs_encryption() -> None:
    assert on_loopback("127.0.0.1:1,127.0.0.2:2")
    assert not on_loopback("127.0.0.1:1,10.0.0.2:2")


def test_an_encrypted_list_of_servers_is_refused_since_it_has_no_name() -> None:
    with pytest.raises(ValueError, match=r"several servers need one name for all, as dns:///chat\.example\.org:443"):
        open_channel("10.0.0.1:1,10.0.0.2:2")
