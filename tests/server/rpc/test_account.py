"""Deletion and export of users over gRPC: nothing is left, nothing comes back, and users cannot act on others."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2

from server.rpc.export import PART_TURNS
from server.store.files.residue import cache_directory
from server.store.sqlite.database import SqliteDatabase
from server.store.store import Store
from tests.server.conftest import Running, running_server
from tests.server.rpc.test_access import Locked, locked  # noqa: F401 (a fixture)
from tests.server.rpc.test_rpcs import ANN, BOB, chat, compare, failure, refusal
from tests.server.store.test_residue import SECRET, bytes_of, line, page

SECONDS = 10.0
ZOE = (("x-user-id", "zebulon"),)
WORD = SECRET.decode()
FORGOTTEN = (grpc.StatusCode.FAILED_PRECONDITION, ["USER_FORGOTTEN"])
ROWS = ("conversations", "turns", "responses", "spans", "comparisons", "feedback", "requests")


async def forget(running: Running, user: Any = ZOE, name: str = "") -> Any:
    return await running.account.ForgetUser(account_pb2.ForgetUserRequest(user=name), metadata=user, timeout=SECONDS)


async def test_callers_without_a_key_name_themselves(running: Running) -> None:
    caller = await running.account.GetCaller(account_pb2.GetCallerRequest(), metadata=ZOE)
    assert (caller.user, caller.role, caller.has_key) == ("zebulon", "operator", False)
    caller = await running.account.GetCaller(account_pb2.GetCallerRequest())
    assert (caller.user, caller.role, caller.has_key) == ("local", "operator", False)


async def test_a_key_identifies_the_caller(locked: Locked) -> None:  # noqa: F811
    for metadata, known in ((locked.ann, ("ann", "user", True)), (locked.operator, ("olga", "operator", True))):
        # A name that callers give themselves is ignored.
        caller = await locked.running.account.GetCaller(account_pb2.GetCallerRequest(), metadata=(*metadata, *ZOE))
        assert (caller.user, caller.role, caller.has_key) == known


async def exported(running: Running, user: Any, name: str = "") -> list[Any]:
    call = running.account.ExportUser(account_pb2.ExportUserRequest(user=name), metadata=user, timeout=SECONDS)
    return [part async for part in call]


async def rows(running: Running) -> dict[str, int]:
    """How many rows belong to a user."""
    return await running.store(lambda store: {table: len(store._db.rows(f"SELECT 1 FROM {table}")) for table in ROWS})


async def say_everything(running: Running, user: Any) -> str:
    """Store every kind of text that a user can write, with SECRET in each; return the conversation's id."""
    running.engine.answer = f"{WORD} answered"
    started, *_ = await chat(running, f"{WORD} asked", user=user, request_id=f"{WORD}-1")
    conversation_id, response_id = started.started.conversation_id, started.started.response_id
    for thumb in (feedback_pb2.THUMB_UP, feedback_pb2.THUMB_DOWN):
        vote = feedback_pb2.SubmitThumbRequest(
            response_id=response_id, thumb=thumb, comment=f"{WORD} {thumb}", request_id=f"r{thumb}"
        )
        await running.feedback.SubmitThumb(vote, metadata=user)
    correction = feedback_pb2.SubmitCorrectionRequest(response_id=response_id, text=f"{WORD} rather", request_id="r3")
    await running.feedback.SubmitCorrection(correction, metadata=user)
    compared, *_ = await compare(running, f"{WORD} or not", user=user, conversation_id=conversation_id)
    choice = feedback_pb2.SubmitChoiceRequest(
        comparison_id=compared.started.comparison_id, choice=feedback_pb2.CHOICE_B, comment=f"{WORD} b"
    )
    await running.feedback.SubmitChoice(choice, metadata=user)
    for directory in (running.data_dir / "rounds" / "round_1", cache_directory(running.data_dir, 1)):
        directory.mkdir(parents=True, exist_ok=True)
    (running.data_dir / "rounds" / "round_1" / "answers.jsonl").write_text(line(conversation_id, WORD))
    (running.data_dir / "rounds" / "round_1" / "report.html").write_text(page(conversation_id))
    (cache_directory(running.data_dir, 1) / "features.db").write_bytes(SECRET)
    return conversation_id


async def demonstrate(running: Running, user: Any) -> str:
    messages = [
        feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content=f"{WORD} shown"),
        feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content=f"{WORD} how"),
    ]
    request = feedback_pb2.SubmitDemonstrationRequest(messages=messages, request_id="r4")
    return str((await running.feedback.SubmitDemonstration(request, metadata=user)).feedback.feedback_id)


async def test_no_byte_of_a_deleted_user_is_left(running: Running) -> None:
    await say_everything(running, ZOE)
    await demonstrate(running, ZOE)
    running.engine.answer = "fine"
    await chat(running, "stays", user=BOB)
    assert bytes_of(running.data_dir).count(SECRET) > 20
    assert b"zebulon" in bytes_of(running.data_dir)
    forgotten = await forget(running)
    assert (forgotten.conversations, forgotten.votes, forgotten.erased) == (1, 4, True)
    left = bytes_of(running.data_dir)
    assert left.count(SECRET) == 0
    assert left.count(b"zebulon") == 0
    assert b"stays" in left
    assert (await rows(running))["conversations"] == 1


async def test_no_byte_of_a_deleted_conversation_is_left(running: Running) -> None:
    conversation_id = await say_everything(running, ZOE)
    request = chat_pb2.DeleteConversationRequest(conversation_id=conversation_id)
    await running.chat.DeleteConversation(request, metadata=ZOE)
    left = bytes_of(running.data_dir)
    # The id of a request, which its user chose, stays in use.
    assert left.count(SECRET) == left.count(f"{WORD}-1".encode())
    code, _, details = await refusal(
        running.chat.Chat(chat_pb2.ChatRequest(message=f"{WORD} asked", request_id=f"{WORD}-1"), metadata=ZOE)
    )
    assert (code, details) == (grpc.StatusCode.FAILED_PRECONDITION, ["REQUEST_DELETED"])
    assert set((await rows(running)).values()) == {0, 4}  # Four repeated requests, blank.


async def test_a_streaming_answer_is_not_stored_after_the_deletion(running: Running) -> None:
    running.engine.answer, running.engine.hold_after = f"{WORD} one two", 1
    call = running.chat.Chat(chat_pb2.ChatRequest(message=WORD, request_id="r1"), metadata=ZOE, timeout=SECONDS)
    await call.read()
    await running.engine.holding.wait()
    running.engine.answer = "fine"
    # Waits for the first one to end, which then has no result to repeat.
    again = running.chat.Chat(chat_pb2.ChatRequest(message=WORD, request_id="r1"), metadata=ZOE, timeout=SECONDS)
    others = asyncio.create_task(chat(running, "hi", user=BOB))
    assert (await forget(running)).conversations == 1
    for one in (call, again):
        code, _, details = await refusal(one)
        assert (code, details) == FORGOTTEN
    running.engine.go_on.set()
    await others
    assert (await rows(running))["responses"] == 1
    assert SECRET not in bytes_of(running.data_dir)


async def test_a_message_that_arrives_after_the_deletion_is_refused(running: Running) -> None:
    method = running.channel.stream_unary("/prefloop.v1.FeedbackService/SubmitDemonstration")
    sent = asyncio.Event()

    async def late() -> AsyncIterator[bytes]:
        await sent.wait()
        part = feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content=WORD)
        yield feedback_pb2.SubmitDemonstrationRequest(messages=[part, part]).SerializeToString()

    call = method(late(), metadata=ZOE)
    async with asyncio.timeout(SECONDS):
        while not running.app._calls._open.get("zebulon"):
            await asyncio.sleep(0)
    await forget(running)
    sent.set()
    code, _, details = await refusal(call)
    assert (code, details) == FORGOTTEN
    assert SECRET not in bytes_of(running.data_dir)


async def test_a_message_that_comes_after_its_key_was_revoked_is_refused(locked: Locked) -> None:  # noqa: F811
    running, sent = locked.running, asyncio.Event()

    async def late() -> AsyncIterator[bytes]:
        await sent.wait()
        part = feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content=WORD)
        yield feedback_pb2.SubmitDemonstrationRequest(messages=[part, part]).SerializeToString()

    method = running.channel.stream_unary("/prefloop.v1.FeedbackService/SubmitDemonstration")
    call = method(late(), metadata=locked.ann)
    async with asyncio.timeout(SECONDS):
        while not running.app._calls._open.get("ann"):
            await asyncio.sleep(0)
    [key] = [key for key in await running.store(lambda store: store.keys.all()) if key.user == "ann"]
    await running.store(lambda store: store.keys.revoke(key.id))
    await running.app._access.refresh()
    sent.set()
    assert await failure(call) == grpc.StatusCode.UNAUTHENTICATED
    assert SECRET not in bytes_of(running.data_dir)


async def test_a_deletion_succeeds_even_if_the_files_cannot_be_cleaned(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chat(running, user=ZOE)

    def refuse(data_dir: Path, *, rewrite: bool) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.admin.retention_task.erase", refuse)
    forgotten = await forget(running)
    assert (forgotten.conversations, forgotten.erased) == (1, False)


async def test_votes_during_a_deletion_are_not_stored(running: Running) -> None:
    started, *_ = await chat(running, user=ZOE)
    disk, busy = threading.Event(), threading.Event()

    def wait(store: Store) -> bool:
        busy.set()
        return disk.wait(SECONDS)

    slow = asyncio.create_task(running.store(wait))
    await asyncio.to_thread(busy.wait, SECONDS)
    vote = feedback_pb2.SubmitThumbRequest(
        response_id=started.started.response_id, thumb=feedback_pb2.THUMB_UP, comment=WORD
    )
    racing = [running.feedback.SubmitThumb(vote, metadata=ZOE) for _ in range(3)]
    forgetting = asyncio.create_task(forget(running))
    async with asyncio.timeout(SECONDS):
        while len(running.store._writers[0]._waiting) < 4:
            await asyncio.sleep(0)
    disk.set()
    # Whatever their status, they were stored before the deletion, or not at all.
    await asyncio.gather(slow, forgetting, *racing, return_exceptions=True)
    assert set((await rows(running)).values()) == {0}
    assert SECRET not in bytes_of(running.data_dir)


async def test_a_deletion_continues_after_the_caller_disconnects(running: Running) -> None:
    await say_everything(running, ZOE)
    call = running.account.ForgetUser(account_pb2.ForgetUserRequest(), metadata=ZOE)
    async with asyncio.timeout(SECONDS):
        while not running.app._account._forgetting:
            await asyncio.sleep(0)
    call.cancel()
    await running.app._account.drain()
    assert set((await rows(running)).values()) == {0}
    assert SECRET not in bytes_of(running.data_dir)


async def test_two_deletions_at_once_do_not_end_each_other(running: Running) -> None:
    await say_everything(running, ZOE)
    both = await asyncio.gather(forget(running), forget(running))
    assert sorted(answer.conversations for answer in both)[1] == 1
    assert set((await rows(running)).values()) == {0}


async def test_a_reader_that_keeps_the_log_is_reported(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    once = SqliteDatabase.empty_log
    monkeypatch.setattr(SqliteDatabase, "empty_log", lambda database: once(database, 0.0))
    await chat(running, WORD, user=ZOE)
    reader = SqliteDatabase(running.data_dir / "prefloop.db")
    reader.execute("BEGIN")
    reader.rows("SELECT * FROM turns")
    assert not (await forget(running)).erased
    reader.execute("COMMIT")
    assert (await forget(running)).erased
    reader.close()
    assert SECRET not in bytes_of(running.data_dir)


async def test_only_an_operator_may_name_another_user(locked: Locked) -> None:  # noqa: F811
    running = locked.running
    await chat(running, user=locked.ann)
    for rpc, request in (
        (running.account.ForgetUser, account_pb2.ForgetUserRequest(user="ann")),
        (running.account.ExportUser, account_pb2.ExportUserRequest(user="ann")),
    ):
        code, message, _ = await refusal(rpc(request, metadata=locked.bob))
        assert (code, message) == (grpc.StatusCode.PERMISSION_DENIED, "Only an operator may name another user.")
    assert len(await exported(running, locked.operator, "ann")) == 2  # A conversation and a key.
    assert (await forget(running, locked.operator, "ann")).conversations == 1
    # Immediately, not only when the server next reads the keys.
    assert await failure(running.account.ForgetUser(account_pb2.ForgetUserRequest(), metadata=locked.ann)) == (
        grpc.StatusCode.UNAUTHENTICATED
    )
    assert (await forget(running, locked.bob, "bob")).conversations == 0
    assert await exported(running, locked.operator, "bob") == []


async def test_an_export_has_all_data_of_the_user_and_none_of_others(locked: Locked) -> None:  # noqa: F811
    running, ann = locked.running, locked.ann
    await say_everything(running, ann)
    await running.feedback.RetractFeedback(
        feedback_pb2.RetractFeedbackRequest(feedback_id=await demonstrate(running, ann)), metadata=ann
    )
    await say_everything(running, locked.bob)
    await running.store(lambda store: store.quarantine.set("ann", actor="operator olga", reason="too fast"))

    def judge(store: Store) -> None:
        for asked in store.machine_choices.missing("m 1"):
            store.machine_choices.add(asked, "m 1", "A", "TIE")

    await running.store(judge)
    parts = await exported(running, ann)
    assert [part.WhichOneof("event") for part in parts] == [
        "conversation",
        "past_feedback",
        "past_feedback",
        "key",
        *["repeated_request"] * 5,
        "machine_choice",
        "quarantine",
    ]
    conversation, thumb, demonstration, key = (getattr(part, part.WhichOneof("event")) for part in parts[:4])
    first, second = conversation.turns
    assert (first.message, first.response.text) == (f"{WORD} asked", f"{WORD} answered ")
    assert {vote.comment or vote.correction for vote in first.response.feedback} == {f"{WORD} 2", f"{WORD} rather"}
    assert (second.comparison.b.text, second.comparison.feedback.comment) == (f"{WORD} answered ", f"{WORD} b")
    assert (thumb.thumb, thumb.comment) == (feedback_pb2.THUMB_UP, f"{WORD} 1")
    assert [message.content for message in demonstration.demonstration.messages] == [f"{WORD} shown", f"{WORD} how"]
    assert (key.role, key.key_id[:4], key.HasField("revoke_time")) == ("user", "key_", False)
    assert [part.repeated_request.request_id for part in parts[4:-2]] == [f"{WORD}-1", "r3", "r4", "r1", "r2"]
    said = parts[-2].machine_choice
    assert (said.comparison_id, said.judge) == (second.comparison.comparison_id, "m 1")
    assert (said.shown, said.swapped) == ("A", "TIE")
    assert (parts[-1].quarantine.action, parts[-1].quarantine.reason) == ("set", "too fast")


async def test_a_long_conversation_is_exported_in_parts(running: Running) -> None:
    started, *_ = await chat(running, "0", user=ZOE)
    for number in range(1, PART_TURNS + 1):
        await chat(running, str(number), user=ZOE, conversation_id=started.started.conversation_id)
    first, second = await exported(running, ZOE)
    messages = [turn.message for part in (first, second) for turn in part.conversation.turns]
    assert messages == [str(number) for number in range(PART_TURNS + 1)]
    assert len(second.conversation.turns) == 1


async def test_a_changed_vote_is_exported_with_its_history(running: Running) -> None:
    started, *_ = await chat(running, user=ZOE)
    for number in range(50):
        vote = feedback_pb2.SubmitThumbRequest(
            response_id=started.started.response_id,
            thumb=feedback_pb2.THUMB_UP,
            comment=str(number),
            request_id=f"r{number:02}",
        )
        await running.feedback.SubmitThumb(vote, metadata=ZOE)
    _, *parts = await exported(running, ZOE)
    assert [part.past_feedback.comment for part in parts[:49]] == [str(number) for number in range(49)]
    assert [part.repeated_request.request_id for part in parts[49:]] == [f"r{number:02}" for number in range(50)]


@pytest.mark.parametrize(("days", "left"), [(0, {"new", WORD}), (32, {"new", WORD}), (30, {"new"})])
async def test_inactive_conversations_are_deleted(tmp_path: Path, days: int, left: set[str]) -> None:
    store = Store.open(tmp_path)
    old = store.conversations.create("ann", WORD)
    store.conversations.create("ann", "new")
    store._db.execute("UPDATE conversations SET update_time = unixepoch() - 31 * 86400 WHERE id = ?", [old])
    store.close()
    async with running_server(tmp_path, retention_days=days) as running:
        # The server does this every hour, and at its start.
        await running.app._retention.tidy()
        listed = await running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=ANN)
        assert {conversation.title for conversation in listed.conversations} == left
        assert (SECRET in bytes_of(tmp_path)) is (WORD in left)
