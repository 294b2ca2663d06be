"""An answer that was begun is ended in the store, even if its caller leaves."""

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from server.engine.base import Sampling
from server.shared.errors import DatabaseError, UnavailableError
from server.store.chats.records import Generation, Response, Span
from server.store.chats.responses import Responses
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.turns import answers as module
from server.turns.answers import Answers, Begun
from tests.server.fakes import FakeEngine

BEGUN: list[Begun] = []


@pytest.fixture
async def thread(tmp_path: Path) -> AsyncIterator[StoreThread]:
    BEGUN.clear()
    thread = StoreThread(tmp_path)
    await thread(lambda store: store.policies.register_reference())
    yield thread
    await thread.close()


def begin(store: Store) -> Begun:
    conversation_id = store.conversations.create("ann", "hello")
    response_id = store.responses.begin(
        "ann", conversation_id, message="hello", replica_id="here", policy_version="v0000", prompt_token_ids=[1],
        temperature=0.85, max_tokens=8, seed=None,
    )  # fmt: skip
    BEGUN.append(Begun(conversation_id, [response_id]))
    return BEGUN[0]


async def send(text: str) -> None:
    """To nobody."""


async def stored(thread: StoreThread) -> Response:
    return await thread(lambda store: store.responses.get("ann", BEGUN[0].response_ids[0]))


async def test_a_caller_who_leaves_while_the_turn_is_being_stored_leaves_it_cancelled(thread: StoreThread) -> None:
    answers, disk = Answers(thread, FakeEngine()), threading.Event()
    slow = asyncio.create_task(thread(lambda store: disk.wait(10)))

    async def call() -> None:
        async with answers.begun(begin):
            pytest.fail("the caller had left")

    calling = asyncio.create_task(call())
    await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    disk.set()
    assert await slow
    await answers.drain()
    response = await stored(thread)
    assert (response.status, response.finish_reason, response.text) == ("cancelled", "cancelled", "")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [(asyncio.CancelledError, "cancelled", "cancelled"), (RuntimeError, "failed", "error")],
)
async def test_an_answer_without_tokens_is_cancelled_or_failed(
    thread: StoreThread, error: type[BaseException], status: str, reason: str
) -> None:
    answers = Answers(thread, FakeEngine())
    with pytest.raises(error):
        async with answers.begun(begin):
            raise error
    await answers.drain()
    response = await stored(thread)
    assert (response.status, response.finish_reason) == (status, reason)


async def test_an_answer_is_finished_even_if_its_last_message_was_not_received(thread: StoreThread) -> None:
    answers = Answers(thread, FakeEngine())

    async def call() -> None:
        async with answers.begun(begin) as begun:
            await answers.sample(begun.response_ids[0], [1], Sampling(0.85, 8), send)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await call()
    await answers.drain()
    response = await stored(thread)
    assert (response.status, response.text) == ("finished", "one two three four ")


async def test_a_turn_that_could_not_be_stored_leaves_nothing(thread: StoreThread) -> None:
    answers = Answers(thread, FakeEngine())

    def full(store: Store) -> Begun:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        async with answers.begun(full):
            pytest.fail("nothing was begun")
    await answers.drain()
    assert await thread(lambda store: store.conversations.page("ann", 10)) == []


async def test_the_beginning_of_an_answer_is_stored_while_it_is_written(
    thread: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEP_SECONDS", 0.0)
    engine = FakeEngine()
    engine.hold_after = 3
    answers = Answers(thread, engine)

    async with answers.begun(begin) as begun:
        sampling = asyncio.create_task(answers.sample(begun.response_ids[0], [1], Sampling(0.85, 8), send))
        await engine.holding.wait()
        response = await stored(thread)
        assert (response.status, response.text, response.token_ids) == ("streaming", "one two three ", [0, 1, 2])
        assert (response.spans, response.shown) == ([Span(0, 3, "v0000")], None)
        # The server is killed now: another one closes the answer as it is.
        await thread(lambda store: store.responses.fail_interrupted("there"))
        response = await stored(thread)
        assert (response.status, response.finish_reason, response.shown) == ("failed", "error", "one two three ")
        engine.go_on.set()
        with pytest.raises(UnavailableError, match="taken for gone"):
            await sampling
    assert (await stored(thread)).text == "one two three "


async def test_an_answer_whose_beginning_cannot_be_stored_goes_on(
    thread: StoreThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "KEEP_SECONDS", 0.0)

    def full(responses: Responses, response_id: str, so_far: Generation) -> None:
        raise DatabaseError("database or disk is full", "full")

    monkeypatch.setattr(Responses, "keep", full)
    answers = Answers(thread, FakeEngine())

    async with answers.begun(begin) as begun:
        await answers.sample(begun.response_ids[0], [1], Sampling(0.85, 8), send)
    await answers.drain()
    assert (await stored(thread)).status == "finished"
    assert "the beginning of an answer could not be stored: database or disk is full" in caplog.messages


async def test_an_answer_that_its_server_has_lost_is_failed_after_a_minute_and_no_other(thread: StoreThread) -> None:
    engine = FakeEngine()
    engine.hold_after = 2
    answers = Answers(thread, engine)

    async with answers.begun(begin) as begun:
        sampling = asyncio.create_task(answers.sample(begun.response_ids[0], [1], Sampling(0.85, 8), send))
        await engine.holding.wait()
        assert answers.writing == frozenset(begun.response_ids)
        await thread(lambda store: store._db.execute("UPDATE responses SET create_time = create_time - 61"))
        # Begun, but its reply was lost with the connection: it is in the store and nowhere else.
        await thread(begin)
        lost = BEGUN[-1].response_ids[0]
        fail = partial(Responses.fail_interrupted, replica_id="here", writing=answers.writing)
        assert await thread(lambda store: fail(store.responses)) == 0
        await thread(lambda store: store._db.execute("UPDATE responses SET create_time = create_time - 61"))
        assert await thread(lambda store: fail(store.responses)) == 1
        assert (await thread(lambda store: store.responses.get("ann", lost))).status == "failed"
        engine.go_on.set()
        await sampling
    assert answers.writing == frozenset()
    assert (await stored(thread)).status == "finished"
