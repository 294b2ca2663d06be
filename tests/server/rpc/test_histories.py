"""Calls that bring their own history, and stop sequences, over real gRPC and a real store."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefloop.v1 import chat_pb2, feedback_pb2
from prefloop.v1.feedback_pb2 import ROLE_ASSISTANT, ROLE_SYSTEM, ROLE_USER, Message

from server.store.store import Store
from tests.server.conftest import Running, running_server
from tests.server.rpc.test_rpcs import ANN, BOB, chat, compare, failure, refusal, turns

ANSWER = "one two three four "


def messages(*texts: str, system: str | None = None) -> list[Message]:
    """The user's and the assistant's texts in turn, the user's last."""
    said = [Message(role=ROLE_SYSTEM, content=system)] if system is not None else []
    for place, text in enumerate(texts):
        said.append(Message(role=ROLE_USER if (len(texts) - place) % 2 else ROLE_ASSISTANT, content=text))
    return said


async def own(running: Running, *texts: str, user: Any = ANN, system: str | None = None, **fields: Any) -> str:
    """The conversation of a call with its own history."""
    started, *_ = await chat(running, "", user, messages=messages(*texts, system=system), **fields)
    return str(started.started.conversation_id)


async def stored(running: Running, conversation_id: str) -> list[tuple[str, str]]:
    """Every turn's message and answer; a given answer in brackets."""
    return [
        (turn.message, f"[{turn.given_answer}]" if turn.HasField("given_answer") else turn.response.text)
        for turn in await turns(running, conversation_id)
    ]


async def test_a_history_goes_on_with_the_conversation_that_it_continues(running: Running) -> None:
    first = await own(running, "hello", system="be kind")
    assert running.engine.encoded[-1] == [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
    ]  # fmt: skip
    # As a client sends it back: without the space at its end.
    assert await own(running, "hello", ANSWER.strip(), "more", system="be kind") == first
    assert running.engine.encoded[-1] == [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "one two three four"}, {"role": "user", "content": "more"},
    ]  # fmt: skip
    assert await own(running, "hello", ANSWER, "more", ANSWER, "last", system="be kind") == first
    assert await stored(running, first) == [("hello", ANSWER), ("more", ANSWER), ("last", ANSWER)]


@pytest.mark.parametrize(
    ("user", "system", "texts"),
    [
        (BOB, None, ("hello", ANSWER, "more")),
        (ANN, "be kind", ("hello", ANSWER, "more")),
        (ANN, None, ("goodbye", "one two", "more")),
    ],
)
async def test_other_histories_are_other_conversations(
    running: Running, user: Any, system: str | None, texts: tuple[str, ...]
) -> None:
    first = await own(running, "hello")
    other = await own(running, *texts, user=user, system=system)
    assert other != first
    assert await stored(running, first) == [("hello", ANSWER)]


async def test_the_same_message_again_belongs_to_the_same_conversation(running: Running) -> None:
    first = await own(running, "hello")
    running.engine.answers = ["another answer"]
    assert await own(running, "hello") == first
    # Either answer may be continued.
    assert await own(running, "hello", ANSWER, "more") == first
    assert await own(running, "hello", "another answer", "more") == first
    assert await own(running, "hello", "another answer", "more") == first
    assert await stored(running, first) == [
        ("hello", ANSWER), ("hello", "another answer "), ("more", ANSWER), ("more", ANSWER), ("more", ANSWER),
    ]  # fmt: skip
    # Each says what it continues.
    shown = await turns(running, first)
    one, two, *_ = [turn.turn_id for turn in shown]
    assert [turn.parent_turn_id for turn in shown] == ["", "", one, two, two]


async def test_what_the_store_does_not_know_is_added_once(running: Running) -> None:
    first = await own(running, "hello", "from elsewhere", "more")
    assert await own(running, "hello", "from elsewhere", "more", ANSWER, "last") == first
    assert await stored(running, first) == [("hello", "[from elsewhere]"), ("more", ANSWER), ("last", ANSWER)]
    # An edited answer is a given one.
    assert await own(running, "hello", "from elsewhere", "more", "edited", "last") == first
    assert await own(running, "hello", "from elsewhere", "more", "edited", "last") == first
    assert (await stored(running, first))[3:] == [("more", "[edited]"), ("last", ANSWER), ("last", ANSWER)]
    # It may begin with an answer.
    greeted = await own(running, "Welcome!", "hello")
    assert running.engine.encoded[-1] == [
        {"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "hello"},
    ]  # fmt: skip
    assert await stored(running, greeted) == [("", "[Welcome!]"), ("hello", ANSWER)]


async def test_a_history_without_its_first_messages_goes_on(running: Running) -> None:
    first = await own(running, "hello", system="be kind")
    await own(running, "hello", ANSWER, "more", system="be kind")
    assert await own(running, "more", ANSWER, "last", system="be kind") == first
    # Also if it begins with an answer, and again from there.
    assert await own(running, ANSWER, "last", ANSWER, "very last", system="be kind") == first
    assert await own(running, "very last", ANSWER, "end", system="be kind") == first
    assert [message for message, _ in await stored(running, first)] == ["hello", "more", "last", "very last", "end"]


async def test_a_conversation_goes_on_by_its_id_after_the_newest_turn(running: Running) -> None:
    first = await own(running, "hello")
    running.engine.answers = ["another answer"]
    await own(running, "hello")
    await chat(running, "more", conversation_id=first)
    assert running.engine.encoded[-1] == [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": "another answer "},
        {"role": "user", "content": "more"},
    ]  # fmt: skip


async def test_a_message_by_id_continues_what_the_model_read(running: Running) -> None:
    first = await own(running, "hello")
    running.engine.hold_after = 2
    # A second answer is being written.
    call = running.chat.Chat(chat_pb2.ChatRequest(messages=messages("hello")), metadata=ANN)
    await call.read()
    await running.engine.holding.wait()
    running.engine.hold_after = None
    await chat(running, "more", conversation_id=first)
    running.engine.go_on.set()
    while await call.read() is not grpc.aio.EOF:
        pass

    def parents(store: Store) -> list[tuple[int, int | None]]:
        return [(turn.seq, turn.parent) for turn in store.conversations.turns("ann", first)]

    [(one, _), (_, two), (_, three)] = await running.store(parents)
    assert (two, three) == (None, one)


async def test_either_answer_of_an_open_comparison_may_be_continued(running: Running) -> None:
    running.engine.answers = ["left", "right"]
    started, *events = await compare(running, "", messages=messages("hello"))
    text = {event.finished.slot: event.finished.text for event in events if event.HasField("finished")}
    conversation = started.started.conversation_id
    assert await own(running, "hello", text[chat_pb2.SLOT_B].strip(), "more") == conversation
    [compared, more] = await turns(running, conversation)
    assert compared.comparison.state == chat_pb2.COMPARISON_STATE_SKIPPED
    assert compared.comparison.continued_with == chat_pb2.SLOT_B
    assert more.response.text == ANSWER
    # It is not undone by going on with the other one: that one is a given answer.
    assert await own(running, "hello", text[chat_pb2.SLOT_A], "more") == conversation
    assert (await turns(running, conversation))[0].comparison.continued_with == chat_pb2.SLOT_B


async def test_a_full_conversation_is_not_continued(tmp_path: Path) -> None:
    async with running_server(tmp_path, max_turns=2) as running:
        first = await own(running, "hello")
        assert await own(running, "hello") == first
        second = await own(running, "hello")
        assert second != first
        assert await stored(running, second) == [("hello", ANSWER)]
        # One that is longer than any conversation would begin a new one with each call.
        said = messages("a", "b", "c", "d", "e")
        code, message, details = await refusal(running.chat.Chat(chat_pb2.ChatRequest(messages=said), metadata=ANN))
        assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ["CONVERSATION_FULL"])
        assert message == "A conversation has at most 2 messages; leave out the oldest ones."


async def test_calls_at_the_same_time_share_a_conversation(running: Running) -> None:
    running.engine.hold_after = 1
    calls = [asyncio.create_task(own(running, "hello")) for _ in range(3)]
    async with asyncio.timeout(10):
        while running.engine.held < 3:
            await running.engine.holding.wait()
            running.engine.holding.clear()
    running.engine.go_on.set()
    assert len(set(await asyncio.gather(*calls))) == 1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": [Message(role=ROLE_ASSISTANT, content="a")]}, "messages must end with the user's message."),
        (
            {"messages": messages("a", "b", "c")[:1] + messages("c")},
            "messages must be the user's and the assistant's in turn, after a system prompt if there is one.",
        ),
        ({"messages": messages("")}, "messages must each be valid: content must not be empty."),
        ({"messages": messages("a" * 501)}, "messages must each be valid: content must have at most 500 characters, "
         "not 501."),
        ({"messages": messages("a"), "message": "b"}, "message must be empty: messages has the message."),
        ({"messages": messages("a"), "conversation_id": "b"},
         "conversation_id must be empty: messages has the conversation."),
        ({"messages": messages("a", system="b"), "system": "c"},
         "system must not be set: messages has a system prompt."),
        ({"messages": messages(*["a"] * 1001)}, "messages must be at most 1000 messages, not 1001."),
        ({"message": "a", "sampling": {"stop": ["1", "2", "3", "4", "5"]}},
         "sampling.stop must be at most 4 sequences, not 5."),
        ({"message": "a", "sampling": {"stop": ["b", ""]}}, "sampling.stop must each have 1 to 100 characters."),
    ],
)  # fmt: skip
async def test_what_is_invalid_is_refused_by_name(running: Running, fields: dict[str, Any], sentence: str) -> None:
    for call in (running.chat.Chat, running.chat.Compare):
        request = chat_pb2.ChatRequest if call is running.chat.Chat else chat_pb2.CompareRequest
        code, message, _ = await refusal(call(request(**fields), metadata=ANN))
        assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, sentence)


async def test_a_history_that_does_not_fit_is_refused_and_not_stored(running: Running) -> None:
    said = messages("a " * 9, "b " * 10, "c c")
    assert await refusal(running.chat.Chat(chat_pb2.ChatRequest(messages=said), metadata=ANN)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "A prompt of 21 tokens is longer than the model's context length; at most 20 fit with an answer.",
        ["PROMPT_TOO_LONG", "messages"],
    )
    # Far more text is not even encoded.
    before = len(running.engine.encoded)
    said = messages(*["a" * 400] * 3)
    code = await failure(running.chat.Chat(chat_pb2.ChatRequest(messages=said), metadata=ANN))
    assert (code, len(running.engine.encoded)) == (grpc.StatusCode.INVALID_ARGUMENT, before)
    listed = await running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=ANN)
    assert list(listed.conversations) == []


async def test_a_repeated_request_is_answered_once(running: Running) -> None:
    first = await own(running, "hello", request_id="r1")
    assert await own(running, "hello", request_id="r1") == first
    assert await stored(running, first) == [("hello", ANSWER)]


async def test_an_answer_ends_before_a_stop_sequence(running: Running) -> None:
    started, *_, last = await chat(running, sampling={"stop": ["three", "two"]})
    assert (last.finished.text, last.finished.finish_reason, last.finished.usage.completion_tokens) == (
        "one ", chat_pb2.FINISH_REASON_STOP_SEQUENCE, 1,
    )  # fmt: skip
    await compare(running, sampling={"stop": ["two"]})
    assert [sampling.stop for sampling in running.engine.samplings] == [("three", "two"), ("two",), ("two",)]

    def read(store: Store) -> tuple[Any, ...]:
        response = store.responses.get("ann", started.started.response_id)
        return response.stop, response.finish_reason, [prompt.stop for prompt in store.snapshots.prompts()]

    # Rollouts of the prompt end there too; the same prompt asked again is one prompt.
    assert await running.store(read) == (("three", "two"), "stop_sequence", [("three", "two")])
    # It is a whole answer: there can be a choice.
    compared, *_ = await compare(running, "other", sampling={"stop": ["two"]})
    choice = feedback_pb2.SubmitChoiceRequest(
        comparison_id=compared.started.comparison_id, choice=feedback_pb2.CHOICE_A
    )
    assert (await running.feedback.SubmitChoice(choice, metadata=ANN)).feedback.choice == feedback_pb2.CHOICE_A


async def find(running: Running, *texts: str, user: Any = ANN, **fields: Any) -> Any:
    said = messages(*texts, "")[:-1]
    request = chat_pb2.FindResponseRequest(messages=said, **fields)
    return (await running.chat.FindResponse(request, metadata=user)).response_id


async def test_an_answer_is_found_by_its_history(running: Running) -> None:
    ids = []
    for texts in [("hello",), ("hello",), ("hello", ANSWER, "more"), ("hello", ANSWER, "more", ANSWER, "last")]:
        started, *_ = await chat(running, "", messages=messages(*texts, system="be kind"))
        ids.append(started.started.response_id)
    found = [await find(running, "hello", ANSWER.strip(), system="be kind")]
    found.append(await find(running, "hello", ANSWER, "more", f"\n{ANSWER}", system="be kind"))
    # Without the first messages, too.
    found.append(await find(running, "more", ANSWER, "last", ANSWER, system="be kind"))
    # Of two answers with one text, the newer one.
    assert found == [ids[1], ids[2], ids[3]]
    for texts, fields in [
        (("more", ANSWER), {"system": "be kind"}),
        (("hello", "another answer"), {"system": "be kind"}),
        (("hello", ANSWER), {}),
        (("hello", ANSWER), {"system": "be kind", "user": BOB}),
    ]:
        with pytest.raises(grpc.aio.AioRpcError, match="There is no response 'with these messages'"):
            await find(running, *texts, **fields)
    call = running.chat.FindResponse(chat_pb2.FindResponseRequest(messages=messages("hello")), metadata=ANN)
    assert (await refusal(call))[:2] == (
        grpc.StatusCode.INVALID_ARGUMENT, "messages must end with the assistant's message after the user's.",
    )  # fmt: skip
