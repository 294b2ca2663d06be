"""Two servers on one store: a conversation, a repeated call, a quota and a vote are the same at both."""

import asyncio
import queue
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2, policy_pb2

from server.store.chats.responses import Responses
from server.store.store import Store
from tests.server.conftest import Running, register, running_server
from tests.server.rpc.test_rpcs import ANN, chat, compare, refusal

pytestmark = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)
SECONDS = 30


@pytest.fixture
async def two(tmp_path: Path, database: str) -> AsyncIterator[tuple[Running, Running]]:
    async with running_server(tmp_path, user_conversations=3) as one, running_server(tmp_path) as other:
        yield one, other


def held(running: Running, after: int = 2) -> None:
    """Let its answers stop after some words, until `go_on` is set."""
    running.engine.hold_after = after


async def start(running: Running, **fields: Any) -> "tuple[asyncio.Task[list[Any]], Any]":
    """A call whose answer is held, and its first event."""
    events = aiter(running.chat.Chat(chat_pb2.ChatRequest(message="hello there", **fields), metadata=ANN))
    first = await anext(events)

    async def rest() -> list[Any]:
        return [event async for event in events]

    return asyncio.create_task(rest()), first.started


async def waits(task: "asyncio.Task[Any]", running: Running) -> None:
    """Return once the server has looked at the store three more times; the task must still wait."""
    reads, seen = running.store.read, asyncio.Semaphore(0)

    async def read(work: Any) -> Any:
        seen.release()
        return await reads(work)

    running.store.read = read  # type: ignore[method-assign]
    async with asyncio.timeout(SECONDS):
        for _ in range(3):
            await seen.acquire()
    running.store.read = reads  # type: ignore[method-assign]
    assert not task.done()


async def test_a_message_waits_for_the_answer_that_another_server_is_writing(two: tuple[Running, Running]) -> None:
    one, other = two
    held(one)
    writing, started = await start(one)
    asking = asyncio.create_task(chat(other, "and now", conversation_id=started.conversation_id))
    await waits(asking, other)
    assert other.engine.prompts == []
    one.engine.go_on.set()
    await writing
    await asking
    # It has read the whole answer, and not the half that there was when it came.
    read = [message["content"] for message in other.engine.encoded[-1]]
    assert read == ["hello there", "one two three four ", "and now"]
    page = await other.chat.GetConversation(
        chat_pb2.GetConversationRequest(conversation_id=started.conversation_id), metadata=ANN
    )
    assert [turn.message for turn in page.conversation.turns] == ["hello there", "and now"]


async def test_a_repeated_call_at_another_server_gets_the_first_ones_answer(two: tuple[Running, Running]) -> None:
    one, other = two
    held(one)
    writing, started = await start(one, request_id="r1")
    repeating = asyncio.create_task(chat(other, request_id="r1"))
    await waits(repeating, other)
    one.engine.go_on.set()
    [*_, finished] = await writing
    first, *_, last = await repeating
    assert first.started.response_id == started.response_id
    assert last.finished.text == finished.finished.text == "one two three four "
    assert (len(one.engine.streams), len(other.engine.streams)) == (1, 0)


async def test_of_two_calls_with_one_request_id_at_once_one_is_executed(two: tuple[Running, Running]) -> None:
    for number in range(10):
        answers = await asyncio.gather(*(chat(each, request_id=f"r{number % 3}{number}") for each in two))
        [ids] = [{events[0].started.response_id for events in answers}]
        assert len(ids) == 1
        await two[0].store(lambda store: store.conversations.delete("ann", store.conversations.page("ann", 1)[0].id))
    assert sum(len(each.engine.streams) for each in two) == 10


async def test_an_answer_of_a_server_that_is_gone_is_failed_and_the_conversation_goes_on(
    two: tuple[Running, Running],
) -> None:
    one, other = two
    held(one)
    writing, started = await start(one)
    asking = asyncio.create_task(chat(other, "and now", conversation_id=started.conversation_id))
    await waits(asking, other)

    def gone(store: Store) -> int:
        [mine] = [replica for replica in store.replicas.alive() if replica.id != other.app._replica_id]
        store.replicas.remove(mine.id)
        return store.responses.fail_interrupted(other.app._replica_id)

    assert await other.store(gone) == 1
    assert (await asking)[-1].finished.text == "one two three four "
    # The other one was only slow. What it says now is not what the conversation went on from.
    one.engine.go_on.set()
    with pytest.raises(grpc.aio.AioRpcError) as broken:
        await writing
    assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    assert broken.value.details() == "This server was taken for gone, and its answer for failed; ask again."
    response = await other.store(lambda store: store.responses.get("ann", started.response_id))
    assert (response.status, response.text) == ("failed", "")


async def test_a_vote_on_another_servers_answer(two: tuple[Running, Running]) -> None:
    one, other = two
    started = (await chat(one))[0].started
    thumb = feedback_pb2.SubmitThumbRequest(
        response_id=started.response_id, thumb=feedback_pb2.THUMB_UP, request_id="v"
    )
    given = (await other.feedback.SubmitThumb(thumb, metadata=ANN)).feedback
    assert (await one.feedback.SubmitThumb(thumb, metadata=ANN)).feedback == given
    compared = (await compare(other))[0].started
    choice = feedback_pb2.SubmitChoiceRequest(comparison_id=compared.comparison_id, choice=feedback_pb2.CHOICE_B)
    await one.feedback.SubmitChoice(choice, metadata=ANN)
    [events] = await one.store(lambda store: store._db.rows("SELECT count(*) AS n FROM feedback_events"))
    assert events["n"] == 2


async def test_a_stored_quota_is_of_all_servers_together(tmp_path: Path, database: str) -> None:
    async with (
        running_server(tmp_path, user_conversations=3) as one,
        running_server(tmp_path, user_conversations=3) as other,
    ):
        outcomes = await asyncio.gather(*(chat(each) for each in (one, other) * 6), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert (len(outcomes) - len(refused), len(refused)) == (3, 9)
        assert await one.store(lambda store: store.conversations.count("ann")) == 3


async def test_a_conversation_is_not_deleted_under_another_servers_answer(
    two: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    held(one)
    writing, started = await start(one)
    request = chat_pb2.DeleteConversationRequest(conversation_id=started.conversation_id)
    looks, elsewhere = queue.SimpleQueue[bool](), Responses.elsewhere

    def look(responses: Responses, replica_id: str, target: str) -> bool:
        looks.put(elsewhere(responses, replica_id, target))
        return elsewhere(responses, replica_id, target)

    monkeypatch.setattr(Responses, "elsewhere", look)
    deleting = asyncio.ensure_future(other.chat.DeleteConversation(request, metadata=ANN))
    assert await asyncio.to_thread(lambda: [looks.get(timeout=SECONDS) for _ in range(2)]) == [True, True]
    one.engine.go_on.set()
    assert (await writing)[-1].finished.text == "one two three four "
    await deleting
    assert (await refusal(other.chat.DeleteConversation(request, metadata=ANN)))[0] is grpc.StatusCode.NOT_FOUND


async def test_both_follow_the_pointer_and_say_so(two: tuple[Running, Running], tmp_path: Path) -> None:
    from tests.server.conftest import publish_version

    one, other = two
    publish_version(tmp_path, "v0001")
    await one.store(lambda store: register(store, "v0001"))
    await one.store(lambda store: store.policies.activate("v0001", actor="ann"))
    async with asyncio.timeout(SECONDS):
        while True:
            found = await other.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), metadata=ANN)
            if {replica.loaded_version for replica in found.replicas} == {"v0001"}:
                break
    assert len(found.replicas) == 2


async def test_a_user_who_is_forgotten_elsewhere_leaves_nothing_behind(two: tuple[Running, Running]) -> None:
    one, other = two
    held(one)
    writing, started = await start(one)
    forgotten = await other.account.ForgetUser(account_pb2.ForgetUserRequest(), metadata=ANN)
    assert forgotten.conversations == 1
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await asyncio.wait_for(writing, SECONDS)
    assert ended.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert ended.value.details() == "This user was deleted; nothing from this call was stored."
    async with asyncio.timeout(SECONDS):
        while one.app._account._owed or await one.store(lambda store: store.conversations.page("ann", 9)):
            await asyncio.sleep(0)
    # Whoever comes again at the server that was asked is somebody new, and stays.
    again = await chat(other, "hello again")
    assert again[0].started.conversation_id != started.conversation_id
    for server in (one, other):
        await server.app._account.end_forgotten()
    assert len(await other.store(lambda store: store.conversations.page("ann", 9))) == 1


@pytest.mark.parametrize("before", [True, False])
async def test_what_comes_before_a_server_hears_of_a_deletion_is_deleted(
    tmp_path: Path, database: str, before: bool
) -> None:
    """A call that begins before the deletion or after it, and has ended when this server hears of it."""
    async with running_server(tmp_path, poll_seconds=60) as one, running_server(tmp_path) as other:
        forget = account_pb2.ForgetUserRequest()
        if before:
            held(one)
            writing, _ = await start(one)
            # It writes again what is deleted, as if its text came at that moment.
            await other.account.ForgetUser(forget, metadata=ANN)
            one.engine.go_on.set()
            await asyncio.wait([writing])
            said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "secret"}]
            await one.store(lambda store: store.feedback.submit_demonstration("ann", said))
        else:
            await other.account.ForgetUser(forget, metadata=ANN)
            await chat(one)
        await one.app._account.end_forgotten()
        assert await one.store(lambda store: store.conversations.page("ann", 9)) == []
        assert await one.store(lambda store: store.feedback.page("ann", 9)) == []


async def test_a_deletion_that_is_owed_is_done_before_a_server_stops(tmp_path: Path, database: str) -> None:
    async with running_server(tmp_path, poll_seconds=60) as one:
        await chat(one)
        one.app._account._owed.add("ann")
    with closing(Store.open(tmp_path)) as store:
        assert store.conversations.page("ann", 9) == []
