"""The asyncio client: two kinds of cancellation, and a connection that is closed during a call."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from prefloop.v1.chat_pb2 import ChatDelta, ChatFinished, ChatStarted
from prefloop.v1.feedback_pb2 import THUMB_UP

from clients import AsyncClient, NotFoundError, UnavailableError
from clients.calls import AsyncStream, ChatEvent
from tests.clients.conftest import WAIT_SECONDS, FakeService, status


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address, user="ana", timeout=WAIT_SECONDS, stream_timeout=WAIT_SECONDS) as client:
        yield client


async def half_heard(client: AsyncClient) -> AsyncStream[ChatEvent]:
    """A stream from which all events sent so far have been read."""
    stream = client.chat("hi")
    assert isinstance(await anext(stream), ChatStarted)
    assert isinstance(await anext(stream), ChatDelta)
    return stream


async def was_cancelled(service: FakeService) -> bool:
    return await asyncio.to_thread(service.cancelled.wait, WAIT_SECONDS)


async def test_a_chat_is_started_deltas_and_finished(client: AsyncClient) -> None:
    events = [event async for event in client.chat("Where do owls live?")]
    assert isinstance(events[0], ChatStarted)
    assert [event.text for event in events if isinstance(event, ChatDelta)] == ["Owls ", "live in ", "trees."]
    assert isinstance(events[-1], ChatFinished)
    assert len(events) == 5


async def test_cancelling_the_stream_ends_the_iteration_and_not_the_task(
    client: AsyncClient, service: FakeService
) -> None:
    service.hold.clear()
    stream = await half_heard(client)
    asyncio.get_running_loop().call_soon(stream.cancel)
    assert [event async for event in stream] == []
    assert await was_cancelled(service)


async def test_cancelling_the_task_is_not_swallowed_and_ends_the_call(
    client: AsyncClient, service: FakeService
) -> None:
    service.hold.clear()
    stream = await half_heard(client)
    listener = asyncio.ensure_future(anext(stream))
    asyncio.get_running_loop().call_soon(listener.cancel)
    with pytest.raises(asyncio.CancelledError):
        await listener
    assert listener.cancelled()
    assert await was_cancelled(service)


async def test_a_timeout_around_a_stream_is_a_timeout(client: AsyncClient, service: FakeService) -> None:
    service.hold.clear()
    stream = await half_heard(client)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await anext(stream)
    assert await was_cancelled(service)


async def test_leaving_the_with_block_cancels_the_call(client: AsyncClient, service: FakeService) -> None:
    service.hold.clear()
    async with client.chat("hi") as stream:
        await anext(stream)
    assert await was_cancelled(service)


async def test_cancelling_the_task_of_a_plain_call_ends_the_call(client: AsyncClient, service: FakeService) -> None:
    service.hold.clear()
    vote = asyncio.create_task(client.thumb("resp", THUMB_UP))
    assert await asyncio.to_thread(service.begun.acquire, timeout=WAIT_SECONDS)
    vote.cancel()
    with pytest.raises(asyncio.CancelledError):
        await vote
    assert await was_cancelled(service)


async def test_a_connection_closed_under_a_call_is_an_error_and_cancels_no_task(
    client: AsyncClient, service: FakeService
) -> None:
    service.hold.clear()
    stream = await half_heard(client)
    listener = asyncio.ensure_future(anext(stream))
    vote = asyncio.create_task(client.thumb("resp", THUMB_UP))
    assert await asyncio.to_thread(service.begun.acquire, timeout=WAIT_SECONDS)
    assert await asyncio.to_thread(service.begun.acquire, timeout=WAIT_SECONDS)
    await client.close()
    for call in (listener, vote):
        with pytest.raises(UnavailableError, match="This program closed the connection"):
            await call


async def test_a_failed_call_has_the_servers_sentence(client: AsyncClient, service: FakeService) -> None:
    service.fail["SubmitThumb"] = [status(grpc.StatusCode.NOT_FOUND, "No such answer.", reason="WHY")]
    service.fail["Chat"] = [status(grpc.StatusCode.NOT_FOUND, "No such conversation.", reason="WHERE")]
    with pytest.raises(NotFoundError, match=r"^No such answer\.$") as thumb:
        await client.thumb("resp", THUMB_UP)
    with pytest.raises(NotFoundError, match=r"^No such conversation\.$") as chat:
        await anext(client.chat("hi"))
    assert (thumb.value.reason, chat.value.reason) == ("WHY", "WHERE")


async def test_many_tasks_share_a_client(client: AsyncClient, service: FakeService) -> None:
    async def ask() -> str:
        return "".join([event.text async for event in client.chat("hi") if isinstance(event, ChatDelta)])

    assert await asyncio.gather(*(ask() for _ in range(20))) == ["Owls live in trees."] * 20
    assert len(set(service.peers)) == 1


async def test_a_list_is_fetched_page_by_page_as_it_is_read(client: AsyncClient, service: FakeService) -> None:
    conversations = client.conversations()
    assert (await anext(conversations)).conversation_id == "newer"
    assert len(service.sent("ListConversations")) == 1
    assert [conversation.conversation_id async for conversation in conversations] == ["older"]
