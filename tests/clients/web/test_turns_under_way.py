"""Turns that are being answered, in the page's process, over a real gRPC server."""

import asyncio
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from prefloop.v1.chat_pb2 import Turn

from clients.async_client import AsyncClient
from clients.web import turns_under_way as live_module
from clients.web.sign_in import SignedIn
from clients.web.turns_under_way import TurnsUnderWay, TurnUnderWay
from tests.server.conftest import running_server


async def test_the_end_of_one_turn_leaves_the_next_one_its_place(tmp_path: Path) -> None:
    """Two tabs send at once; the second answer begins while the page still fetches the first stored turn."""
    may_read = asyncio.Event()

    class Slow(AsyncClient):
        async def refetch(self, stream: Any, timeout: float = 60.0) -> Turn:
            await may_read.wait()
            return await super().refetch(stream, timeout)

    turns = TurnsUnderWay()
    async with (
        asyncio.timeout(20),
        running_server(tmp_path) as running,
        Slow(f"127.0.0.1:{running.app.port}", user="ann") as client,
    ):
        ann = SignedIn(client, "ann", is_operator=True, has_key=False)
        first = await turns.begin(ann, "One.", client.chat("One."))
        async for _ in first.changes():
            if first.turn.response.text == "one two three four ":
                break
        running.engine.hold_after = 2
        second = await turns.begin(ann, "Two.", client.chat("Two.", conversation_id=first.conversation_id))
        may_read.set()
        async for _ in first.changes():
            pass
        await asyncio.sleep(0)
        assert turns.find(ann, first.conversation_id) is second
        running.engine.go_on.set()
        async for _ in second.changes():
            pass
        await asyncio.sleep(0)
        assert turns.find(ann, first.conversation_id) is None
        assert second.turn.response.text == "one two three four "
        await turns.close()


async def test_a_growing_answer_is_drawn_once_for_all_who_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "PAUSE_SECONDS", 0.01)
    drawn: list[str] = []

    def draw(turn: Turn, notice: str) -> str:
        drawn.append(f"{len(drawn)} {turn.response.text}")
        return drawn[-1]

    async def read(live: TurnUnderWay) -> list[str]:
        return [live.drawn(draw) async for _ in live.changes()]

    turns = TurnsUnderWay()
    async with (
        asyncio.timeout(20),
        running_server(tmp_path) as running,
        AsyncClient(f"127.0.0.1:{running.app.port}", user="ann") as client,
    ):
        ann = SignedIn(client, "ann", is_operator=True, has_key=False)
        running.engine.hold_after = 2
        live = await turns.begin(ann, "One.", client.chat("One."))
        readers = [asyncio.create_task(read(live)) for _ in range(20)]
        while not any(text.endswith(" one two ") for text in drawn):
            await asyncio.sleep(0)
        running.engine.go_on.set()
        seen = await asyncio.gather(*readers)
        # All twenty readers saw the same turns to the end, and each was drawn once, also if it was read again.
        assert len({tuple(texts) for texts in seen}) == 1
        assert [text for text, _ in groupby(seen[0])] == drawn
        assert drawn[-1].endswith(" one two three four ")
        await turns.close()
