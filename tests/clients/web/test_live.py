"""Answers that are being written, as the page's server holds them, over a real gRPC server."""

import asyncio
from pathlib import Path
from typing import Any

from prefloop.v1.chat_pb2 import Turn

from clients.async_client import AsyncClient
from clients.web.live import LiveTurns
from clients.web.person import Person
from tests.server.conftest import running_server


async def test_the_end_of_one_turn_leaves_the_next_one_its_place(tmp_path: Path) -> None:
    """Two tabs send at once; the second answer begins while the page still reads what was kept of the first."""
    may_read = asyncio.Event()

    class Slow(AsyncClient):
        async def refetch(self, stream: Any, timeout: float = 60.0) -> Turn:
            await may_read.wait()
            return await super().refetch(stream, timeout)

    turns = LiveTurns()
    async with (
        asyncio.timeout(20),
        running_server(tmp_path) as running,
        Slow(f"127.0.0.1:{running.app.port}", user="ann") as client,
    ):
        ann = Person(client, "ann", is_operator=True, has_key=False)
        first = await turns.begin(ann, "One.", client.chat("One."))
        async for _ in first.changes():
            if first.turn.response.text == "one two three four ":
                break
        running.policy.hold_after = 2
        second = await turns.begin(ann, "Two.", client.chat("Two.", conversation_id=first.conversation_id))
        may_read.set()
        async for _ in first.changes():
            pass
        await asyncio.sleep(0)
        assert turns.find(ann, first.conversation_id) is second
        running.policy.go_on.set()
        async for _ in second.changes():
            pass
        await asyncio.sleep(0)
        assert turns.find(ann, first.conversation_id) is None
        assert second.turn.response.text == "one two three four "
        await turns.close()
