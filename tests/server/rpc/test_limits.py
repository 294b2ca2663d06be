"""Limits of one caller and of all callers, and malicious callers."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status
from prefloop.v1 import chat_pb2, feedback_pb2

from server.rpc import interceptor
from server.rpc import limits as limits_module
from server.rpc.limits import Limits
from server.shared.errors import ResourceExhaustedError
from server.store.chats import feedback
from server.store.keys import Caller
from tests.server.conftest import Running, running_server
from tests.server.rpc.test_rpcs import ANN, BOB, chat, failure, refusal, turns

CHAT, VOTE = "/prefloop.v1.ChatService/Chat", "/prefloop.v1.FeedbackService/SubmitThumb"
ANNA, BEN = Caller("anna", "user"), Caller("ben", "user")
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
SECONDS = 10.0


def admitted(limits: Limits, caller: Caller) -> str:
    """Empty, or the reason of a refusal; the call ends at once."""
    return refused(limits.admit(caller))


def answered(limits: Limits, user: str, answers: int) -> str:
    return refused(limits.answering(user, answers))


def refused(block: AbstractContextManager[None]) -> str:
    try:
        with block:
            return ""
    except ResourceExhaustedError as error:
        return error.reason


def test_a_users_rate_is_separate_and_says_when_to_retry() -> None:
    limits = Limits(2, user_calls=9, answers=9, application_calls=9)
    assert [admitted(limits, ANNA) for _ in range(3)] == ["", "", "USER_RATE"]
    assert admitted(limits, BEN) == ""
    with pytest.raises(ResourceExhaustedError) as refused, limits.admit(ANNA):
        pass
    # Two per minute are one every 30 seconds.
    assert 29 < refused.value.retry_seconds <= 30


def test_concurrent_calls_are_counted_while_they_run() -> None:
    limits = Limits(100, user_calls=2, answers=9, application_calls=9)
    with limits.admit(ANNA):
        with limits.admit(ANNA):
            assert admitted(limits, ANNA) == "USER_CALLS"
            assert admitted(limits, BEN) == ""
        assert admitted(limits, ANNA) == ""


def test_an_applications_users_are_counted_together() -> None:
    """It could invent any number of them."""
    limits, shop = Limits(100, user_calls=9, answers=9, application_calls=2), Caller("shop", "application")
    with limits.admit(shop.on_behalf_of("anna")), limits.admit(shop.on_behalf_of("ben")):
        assert admitted(limits, shop.on_behalf_of("cora")) == "APPLICATION_CALLS"
        # Others, and what it asks for itself, are counted as ever.
        assert [admitted(limits, caller) for caller in (ANNA, shop)] == ["", ""]
    assert admitted(limits, shop.on_behalf_of("cora")) == ""


def test_answers_are_counted_over_all_users() -> None:
    limits = Limits(100, user_calls=9, answers=3, application_calls=9)
    with limits.answering("anna", 2):
        assert answered(limits, "ben", 2) == "QUEUE_FULL"
        with limits.answering("ben", 1):
            assert answered(limits, "ben", 1) == "QUEUE_FULL"
    assert answered(limits, "ben", 2) == ""


def test_users_who_take_all_they_can_leave_room_for_one_more() -> None:
    limits = Limits(1000, user_calls=900, answers=256, application_calls=9)
    with ExitStack() as under_way:

        def fill(user: str) -> int:
            count = 0
            while not (reason := answered(limits, user, 2)):
                under_way.enter_context(limits.answering(user, 2))
                count += 2
            assert reason == "USER_ANSWERS"
            return count

        assert [fill(user) for user in ("anna", "ben", "cora", "dan")] == [128, 64, 32, 16]
        assert answered(limits, "eve", 2) == ""
    assert answered(limits, "anna", 128) == ""


async def test_a_call_that_waits_for_the_previous_turn_takes_no_place_in_the_queue(tmp_path: Path) -> None:
    async with running_server(tmp_path, max_streams=2, max_waiting=0, user_calls=32) as running:
        started, *_ = await chat(running)
        conversation = started.started.conversation_id
        running.engine.hold_after = 1
        waiting = [asyncio.create_task(chat(running, conversation_id=conversation)) for _ in range(8)]
        await running.engine.holding.wait()
        running.engine.hold_after = None
        # One of the eight is being sampled, which leaves a place.
        assert (await chat(running, user=BOB))[-1].finished.text
        running.engine.go_on.set()
        assert len([await each for each in waiting]) == 8


def test_a_call_that_failed_is_no_longer_counted() -> None:
    limits = Limits(100, user_calls=1, answers=1, application_calls=9)
    with pytest.raises(ValueError, match="oops"), limits.admit(ANNA):
        raise ValueError("oops")
    assert admitted(limits, ANNA) == ""


async def test_a_full_queue_is_refused_with_a_time_to_retry(tmp_path: Path) -> None:
    async with running_server(tmp_path, max_streams=1, max_waiting=0) as running:
        running.engine.hold_after = 1
        first = running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN)
        await running.engine.holding.wait()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await chat(running, user=BOB)
        assert refused.value.code() == EXHAUSTED
        assert await retry_seconds(refused.value) == 2.0
        running.engine.go_on.set()
        assert [event async for event in first][-1].finished.text == "one two three four "
        assert (await chat(running, user=BOB))[-1].finished.text == "one two three four "


async def retry_seconds(error: grpc.aio.AioRpcError) -> float:
    for packed in rpc_status.from_call(error).details:
        info = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    raise AssertionError("no RetryInfo")


async def test_every_invalid_field_is_named(running: Running) -> None:
    bad = chat_pb2.ChatRequest(
        conversation_id="c" * 129, sampling=chat_pb2.SamplingOptions(temperature=3, max_tokens=21, seed=2**63)
    )
    code, message, details = await refusal(running.chat.Chat(bad, metadata=ANN))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message == "conversation_id must have at most 128 characters, not 129."
    fields = ["conversation_id", "message", "sampling.temperature", "sampling.max_tokens", "sampling.seed"]
    assert details == ["INVALID_FIELD", *fields]


async def test_a_conversation_has_a_maximum_length(tmp_path: Path) -> None:
    async with running_server(tmp_path, max_turns=2) as running:
        started, *_ = await chat(running)
        conversation = started.started.conversation_id
        await chat(running, conversation_id=conversation)
        code, message, details = await refusal(
            running.chat.Chat(chat_pb2.ChatRequest(message="hi", conversation_id=conversation), metadata=ANN)
        )
        assert (code, details) == (EXHAUSTED, ["CONVERSATION_FULL"])
        assert message == "This conversation is full; start another one."


async def test_stored_data_of_a_user_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "MOST_EVENTS", 3)
    async with running_server(tmp_path, user_conversations=2, user_demonstrations=2) as running:
        first, *_ = await chat(running)
        second, *_ = await chat(running)
        for call in (
            running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN),
            running.chat.Compare(chat_pb2.CompareRequest(message="hi"), metadata=ANN),
        ):
            code, message, details = await refusal(call)
            assert (code, details) == (EXHAUSTED, ["USER_CONVERSATIONS"])
            assert message == "You have 2 conversations; delete one before you start another."
        # Other users have their own limits; existing conversations continue; a deletion makes room.
        await chat(running, user=BOB)
        await chat(running, conversation_id=first.started.conversation_id)
        deleted = chat_pb2.DeleteConversationRequest(conversation_id=first.started.conversation_id)
        await running.chat.DeleteConversation(deleted, metadata=ANN)
        await chat(running)

        roles = (feedback_pb2.ROLE_USER, feedback_pb2.ROLE_ASSISTANT)
        messages = [feedback_pb2.Message(role=role, content="text") for role in roles]
        demonstration = feedback_pb2.SubmitDemonstrationRequest(messages=messages)
        kept = await running.feedback.SubmitDemonstration(demonstration, metadata=ANN)
        retracted = feedback_pb2.RetractFeedbackRequest(feedback_id=kept.feedback.feedback_id)
        await running.feedback.RetractFeedback(retracted, metadata=ANN)
        await running.feedback.SubmitDemonstration(demonstration, metadata=ANN)
        code, message, details = await refusal(running.feedback.SubmitDemonstration(demonstration, metadata=ANN))
        assert (code, details) == (EXHAUSTED, ["USER_DEMONSTRATIONS"])
        assert message == "You have 2 demonstrations, including retracted ones, which is the limit."
        await running.feedback.SubmitDemonstration(demonstration, metadata=BOB)

        up = feedback_pb2.SubmitThumbRequest(response_id=second.started.response_id, thumb=feedback_pb2.THUMB_UP)
        for _ in range(3):
            await running.feedback.SubmitThumb(up, metadata=ANN)
        code, message, details = await refusal(running.feedback.SubmitThumb(up, metadata=ANN))
        assert (code, details) == (EXHAUSTED, ["VOTE_CHANGES"])
        assert message == "You have voted 3 times on this answer, including changes, which is the limit."


async def test_a_repeated_request_is_answered_even_if_the_queue_is_full(tmp_path: Path) -> None:
    async with running_server(tmp_path, user_conversations=1) as running:
        started, *_ = await chat(running, request_id="a")
        again, *_ = await chat(running, request_id="a")
        assert again.started.response_id == started.started.response_id


async def test_invalid_bytes_are_the_callers_error(running: Running) -> None:
    for method in (running.channel.unary_unary(VOTE), running.channel.unary_stream(CHAT)):
        code, message, details = await refusal(method(b"\xff\xff\xff", metadata=ANN))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert (message, details) == (
            "The message does not match its protobuf definition.",
            ["INVALID_FIELD", "request"],
        )


async def test_an_oversized_message_or_metadata_is_refused(running: Running) -> None:
    vote = running.channel.unary_unary(VOTE)
    assert await failure(vote(b"\x00" * 5_000_000, metadata=ANN)) == EXHAUSTED
    assert await failure(vote(b"", metadata=(*ANN, ("x-long", "a" * 17_000)))) == EXHAUSTED
    assert await failure(vote(b"", metadata=ANN)) == grpc.StatusCode.INVALID_ARGUMENT


async def silent() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def test_a_call_without_its_message_ends(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptor, "MESSAGE_SECONDS", 0.05)
    call = running.channel.stream_unary(VOTE)(silent(), metadata=ANN)
    assert await refusal(call) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "The call or its message took longer than allowed.",
        ["DEADLINE_EXCEEDED"],
    )

    async def nothing() -> AsyncIterator[bytes]:
        return
        yield

    call = running.channel.stream_unary(VOTE)(nothing(), metadata=ANN)
    assert (await refusal(call))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "The call has no message.")


async def test_requests_without_a_key_are_validated_too(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    check = "/grpc.health.v1.Health/Check"
    with monkeypatch.context() as impatient:
        impatient.setattr(interceptor, "MESSAGE_SECONDS", 0.05)
        assert await failure(running.channel.stream_unary(check)(silent())) == grpc.StatusCode.DEADLINE_EXCEEDED
    code, message, _ = await refusal(running.channel.unary_unary(check)(b"\xff\xff\xff"))
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "The message does not match its protobuf definition.",
    )
    unknown = health_pb2.HealthCheckRequest(service="none").SerializeToString()
    assert await failure(running.channel.unary_unary(check)(unknown)) == grpc.StatusCode.NOT_FOUND
    assert await running.channel.unary_unary(check)(b"") == b"\x08\x01"


async def test_open_calls_without_a_key_do_not_block_health_checks(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits_module, "STRANGERS", 3)
    # Otherwise each would be refused for sending no message.
    monkeypatch.setattr(interceptor, "MESSAGE_SECONDS", 6 * SECONDS)
    check = "/grpc.health.v1.Health/Check"
    opened = []
    for number in (1, 2, 3):
        call = running.channel.stream_unary(check)(silent())
        opened.append(asyncio.ensure_future(refusal(call)))
        async with asyncio.timeout(SECONDS):
            while len(running.app._limits._strangers) < number:
                await asyncio.sleep(0)
    assert await running.channel.unary_unary(check)(b"") == b"\x08\x01"
    ended, open_ = await asyncio.wait(opened, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
    assert ended == {opened[0]}
    assert opened[0].result() == (
        EXHAUSTED,
        "There are too many calls without a key, and this one was the oldest.",
        ["STRANGERS"],
    )
    # Health checks are unlimited, and calls with a key do not count.
    for _ in range(9):
        assert await running.channel.unary_unary(check)(b"") == b"\x08\x01"
    assert (await chat(running))[-1].finished.text == "one two three four "
    for task in open_:
        task.cancel()


async def test_a_stalled_reader_counts_until_the_status_is_sent(tmp_path: Path) -> None:
    async with running_server(tmp_path, call_seconds=1.0, user_calls=1, max_tokens=2_000) as running:
        running.engine.max_model_len = 50_000
        # Four hundred words fill the client's flow-control window long before the deadline.
        running.engine.answers = [" ".join(["x" * 10_000] * 2_000)]
        call = running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN)
        await call.read()
        # The deadline has ended the answer, but the client does not read the status: the share is still used up.
        hers = await sampled(running)
        async with asyncio.timeout(SECONDS):
            while not hers.ended:
                await chat(running, user=BOB)
        assert await failure(running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN)) == EXHAUSTED
        call.cancel()
        async with asyncio.timeout(SECONDS):
            while (
                await failure(running.feedback.SubmitThumb(feedback_pb2.SubmitThumbRequest(), metadata=ANN))
                == EXHAUSTED
            ):
                pass


async def test_calls_without_a_message_only_use_up_their_callers_share(tmp_path: Path) -> None:
    async with running_server(tmp_path, user_calls=3) as running:
        opened = [running.channel.stream_unary(VOTE)(silent(), metadata=ANN) for _ in range(4)]
        ended, open_ = await asyncio.wait(
            [asyncio.ensure_future(failure(call)) for call in opened], return_when=asyncio.FIRST_COMPLETED
        )
        assert [task.result() for task in ended] == [EXHAUSTED]
        assert len(open_) == 3
        assert (await chat(running, user=BOB))[-1].finished.text == "one two three four "
        for call in opened:
            call.cancel()
        await asyncio.wait(open_)


async def test_the_servers_deadline_ends_a_call_and_stores_the_text_so_far(tmp_path: Path) -> None:
    async with running_server(tmp_path, call_seconds=0.2) as running:
        running.engine.hold_after = 2
        call = running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN)
        started = await call.read()
        assert await refusal(call) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "The call or its message took longer than allowed.",
            ["DEADLINE_EXCEEDED"],
        )
        [turn] = await turns(running, started.started.conversation_id)
        assert turn.response.text == "one two "


async def sampled(running: Running) -> Any:
    """The first answer, once it is being sampled: `started` is sent before."""
    async with asyncio.timeout(SECONDS):
        while not running.engine.streams:
            await asyncio.sleep(0)
    return running.engine.streams[0]


async def test_a_stalled_reader_only_delays_their_own_answer_with_bounded_memory(tmp_path: Path) -> None:
    async with running_server(tmp_path, max_tokens=20_000) as running:
        running.engine.max_model_len = 50_000
        # 20 MB in all, of which the client's flow control takes 4 unread.
        running.engine.answer = " ".join(["x" * 1000] * 20_000)
        call = running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN)
        started = await call.read()
        await sampled(running)
        # Others are answered while it stalls, which gives the stalled one time to continue if it could.
        running.engine.answers = ["short"] * 50
        for _ in range(50):
            await chat(running, user=BOB)
        [stalled] = [stream for stream in running.engine.streams if len(stream.words) == 20_000]
        assert len(stalled.said) < 6_000
        call.cancel()
        async with asyncio.timeout(SECONDS):
            while not (await turns(running, started.started.conversation_id))[0].response.finish_reason:
                pass
        assert len(stalled.said) < 6_000


async def test_half_open_connections_do_not_disturb_connected_clients(tmp_path: Path) -> None:
    async with running_server(tmp_path, max_connections=60) as running:
        port = running.app.port
        # Connections that send only the first bytes of HTTP/2, or nothing.
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in half[:10]:
            writer.write(b"PRI * HTTP/2.0")
            await writer.drain()
        assert (await chat(running))[-1].finished.text == "one two three four "
        flood = [socket.create_connection(("127.0.0.1", port), timeout=SECONDS) for _ in range(200)]
        assert (await chat(running))[-1].finished.text == "one two three four "
        # The server closed most of them.
        closed = await asyncio.gather(*(asyncio.to_thread(is_closed, one) for one in flood[100:]))
        assert all(closed)
        for one in flood:
            one.close()
        for _, writer in half:
            writer.close()
        options: Any = [("grpc.use_local_subchannel_pool", 1)]
        async with asyncio.timeout(SECONDS), grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            again = channel.unary_unary(VOTE)
            while await failure(again(b"", metadata=BOB)) != grpc.StatusCode.INVALID_ARGUMENT:
                pass


def is_closed(one: socket.socket) -> bool:
    """Whether the other side closed it at once, greeting first or not: silence alone ends a connection after 10 s."""
    one.settimeout(2.0)
    try:
        while one.recv(1000):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


async def test_a_demonstration_of_the_longest_messages_fits(running: Running) -> None:
    running.engine.max_model_len = 10_000
    part = feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content="ä" * 500)
    last = feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content="ä" * 500)
    request = feedback_pb2.SubmitDemonstrationRequest(messages=[part] * 3 + [last])
    kept = await running.feedback.SubmitDemonstration(request, metadata=ANN)
    assert [len(message.content) for message in kept.feedback.demonstration.messages] == [500] * 4
    request = feedback_pb2.SubmitDemonstrationRequest(messages=[part] * 4 + [last])
    assert await refusal(running.feedback.SubmitDemonstration(request, metadata=ANN)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "messages must have at most 2000 characters together, not 2500.",
        ["INVALID_FIELD", "messages"],
    )
