"""Every RPC over real gRPC and a real store, with a policy that can be held, killed and broken."""

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from prefloop.v1 import chat_pb2, feedback_pb2, policy_pb2
from safetensors.numpy import save_file

from server import app
from server.shared.model.text import UnknownTokenError
from server.store.files.manifest import write_manifest
from server.store.learning.policies import Policies
from server.store.store import Store
from tests.server.conftest import Running, publish_version, register, running_server

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ANN = (("x-user-id", "ann"),)
BOB = (("x-user-id", "bob"),)


async def chat(running: Running, message: str = "hello there", user: Any = ANN, **fields: Any) -> list[Any]:
    return [event async for event in running.chat.Chat(chat_pb2.ChatRequest(message=message, **fields), metadata=user)]


async def compare(running: Running, message: str = "hello there", user: Any = ANN, **fields: Any) -> list[Any]:
    request = chat_pb2.CompareRequest(message=message, **fields)
    return [event async for event in running.chat.Compare(request, metadata=user)]


async def turns(running: Running, conversation_id: str) -> list[Any]:
    request = chat_pb2.GetConversationRequest(conversation_id=conversation_id)
    return list((await running.chat.GetConversation(request, metadata=ANN)).conversation.turns)


async def _end(call: Any) -> None:
    if not hasattr(call, "read"):
        await call
        return
    while await call.read() is not grpc.aio.EOF:
        pass


async def failure(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await _end(call)
    return error.value.code()


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, list[str]]:
    """Code, message, and the reason and fields of a refused call."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await _end(call)
    details = []
    for packed in rpc_status.from_call(error.value).details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if packed.Unpack(info):
            details.append(info.reason)
        elif packed.Unpack(bad):
            details.extend(violation.field for violation in bad.field_violations)
    return error.value.code(), error.value.details(), details


async def test_a_chat_streams_and_is_on_disk_before_it_is_finished(running: Running) -> None:
    started, *deltas, finished = await chat(running)
    assert started.started.policy_version == "v0000"
    assert [delta.delta.text for delta in deltas] == ["one ", "two ", "three ", "four "]
    assert finished.finished.text == "one two three four "
    assert finished.finished.finish_reason == chat_pb2.FINISH_REASON_STOP
    assert (finished.finished.usage.prompt_tokens, finished.finished.usage.completion_tokens) == (2, 4)
    [turn] = await turns(running, started.started.conversation_id)
    assert turn.response.response_id == started.started.response_id
    assert [(span.start, span.end, span.policy_version) for span in turn.response.spans] == [(0, 4, "v0000")]
    assert turn.response.temperature == pytest.approx(0.85)


async def test_an_explicit_zero_is_not_an_unset_field(running: Running) -> None:
    await chat(running, sampling=chat_pb2.SamplingOptions(temperature=0, seed=0, max_tokens=3))
    [sampling] = running.engine.samplings
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.0, 0, 3)


async def test_the_model_reads_the_whole_conversation(running: Running) -> None:
    started, *_ = await chat(running)
    await chat(running, "and then", conversation_id=started.started.conversation_id)
    assert running.engine.encoded[-1] == [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "one two three four "},
        {"role": "user", "content": "and then"},
    ]


def system(running: Running, number: int = -1) -> str | None:
    """The system prompt that the model read."""
    first = running.engine.encoded[number][0]
    return first["content"] if first["role"] == "system" else None


async def test_a_conversation_keeps_the_system_prompt_that_it_began_with(running: Running) -> None:
    started, *_ = await chat(running, system="be brief")
    conversation_id = started.started.conversation_id
    assert running.engine.encoded[-1] == [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"},
    ]  # fmt: skip
    await compare(running, "and then", conversation_id=conversation_id)
    assert (system(running), len(running.engine.encoded[-1])) == ("be brief", 4)
    await chat(running, "again", conversation_id=conversation_id, system="be brief")
    call = running.chat.Chat(
        chat_pb2.ChatRequest(message="no", conversation_id=conversation_id, system="be long"), metadata=ANN
    )
    assert await refusal(call) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "A conversation keeps the system prompt that it began with.",
        ["INVALID_FIELD", "system"],
    )
    request = chat_pb2.GetConversationRequest(conversation_id=conversation_id)
    assert (await running.chat.GetConversation(request, metadata=ANN)).conversation.system == "be brief"
    await compare(running, "first", system="be kind")
    assert system(running) == "be kind"
    # Without one there is none.
    await chat(running)
    assert system(running) is None


async def test_the_servers_system_prompt_is_the_default_of_new_conversations(tmp_path: Path) -> None:
    async with running_server(tmp_path, system_prompt="you are owl") as running:
        started, *_ = await chat(running)
        assert system(running) == "you are owl"
        await chat(running, system="")
        assert system(running) is None
    # A conversation keeps it, whatever the setting is later.
    async with running_server(tmp_path) as running:
        await chat(running, "more", conversation_id=started.started.conversation_id)
        assert system(running) == "you are owl"


async def test_a_second_message_waits_for_the_first_answer_also_in_a_new_conversation(running: Running) -> None:
    running.engine.hold_after = 2
    call = running.chat.Chat(chat_pb2.ChatRequest(message="hello there"), metadata=ANN)
    conversation_id = (await call.read()).started.conversation_id
    await running.engine.holding.wait()
    running.engine.hold_after = None
    second = asyncio.create_task(chat(running, "and then", conversation_id=conversation_id))
    # Another user is answered in the meantime, so the second message had time to go wrong.
    await chat(running, "other", user=BOB)
    running.engine.go_on.set()
    await second
    assert running.engine.encoded[-1][1] == {"role": "assistant", "content": "one two three four "}


async def test_a_long_conversation_loses_its_oldest_turns_whole(running: Running) -> None:
    # 40 tokens minus 20 for the answer leave 20: two turns of 2 + 4 and the new message of 2 fit, three would too (20).
    started, *_ = await chat(running)
    for _ in range(3):
        await chat(running, "next one", conversation_id=started.started.conversation_id)
    assert len(running.engine.prompts[-1]) == 20
    await chat(running, "next one", conversation_id=started.started.conversation_id)
    assert len(running.engine.prompts[-1]) == 20
    assert running.engine.prompts[-1][:2] == [len("next"), len("one")]


async def test_a_message_that_cannot_fit_is_refused_and_not_stored(running: Running) -> None:
    code, message, details = await refusal(running.chat.Chat(chat_pb2.ChatRequest(message="a " * 21), metadata=ANN))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message == "The message has 21 tokens; at most 20 fit with its answer."
    assert details == ["PROMPT_TOO_LONG", "message"]
    listed = await running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=ANN)
    assert list(listed.conversations) == []


async def test_a_cancelled_stream_stores_its_tokens_and_spans(running: Running) -> None:
    running.engine.hold_after = 2
    call = running.chat.Chat(chat_pb2.ChatRequest(message="hello"), metadata=ANN)
    started = await call.read()
    await running.engine.holding.wait()
    call.cancel()
    running.engine.hold_after = None
    async with asyncio.timeout(10):
        while True:
            [turn] = await turns(running, started.started.conversation_id)
            if turn.response.finish_reason:
                break
    assert turn.response.finish_reason == chat_pb2.FINISH_REASON_CANCELLED
    assert turn.response.text == "one two "
    assert [(span.start, span.end) for span in turn.response.spans] == [(0, 2)]


async def test_a_deadline_stops_the_answer(running: Running) -> None:
    running.engine.hold_after = 1
    call = running.chat.Chat(chat_pb2.ChatRequest(message="hello"), metadata=ANN, timeout=0.3)
    assert await failure(call) == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_dead_engine_is_unavailable_and_the_message_is_stored(running: Running) -> None:
    running.engine.dies = True
    call = running.chat.Chat(chat_pb2.ChatRequest(message="hello"), metadata=ANN)
    started = await call.read()
    code, message, details = await refusal(call)
    assert (code, message, details) == (grpc.StatusCode.UNAVAILABLE, "The engine stopped.", ["ENGINE_DEAD"])
    [turn] = await turns(running, started.started.conversation_id)
    assert (turn.message, turn.response.finish_reason) == ("hello", chat_pb2.FINISH_REASON_ERROR)


async def test_a_dead_engine_is_restarted_and_health_reports_it(running: Running) -> None:
    health = health_pb2_grpc.HealthStub(running.channel)  # type: ignore[no-untyped-call]
    watching = health.Watch(health_pb2.HealthCheckRequest())

    async def until(status: Any) -> None:
        async with asyncio.timeout(10):
            while (await watching.read()).status != status:
                pass

    await until(SERVING)
    running.engine.dies = True
    await until(NOT_SERVING)
    running.engine.may_revive.set()
    await until(SERVING)
    assert (await chat(running))[-1].finished.text == "one two three four "
    watching.cancel()


async def test_an_engine_that_hangs_is_killed_and_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "PROBE_SECONDS", 0.01)
    async with running_server(tmp_path) as running:
        health = health_pb2_grpc.HealthStub(running.channel)  # type: ignore[no-untyped-call]
        watching = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert (await watching.read()).status == SERVING
        running.engine.hangs = True
        assert (await watching.read()).status == NOT_SERVING
        running.engine.may_revive.set()
        assert (await watching.read()).status == SERVING
        watching.cancel()
    assert "the engine has not finished a step for 30 s; it was killed" in caplog.messages


async def test_the_same_request_id_is_one_turn(running: Running) -> None:
    first = await chat(running, request_id="r1")
    again = await chat(running, request_id="r1")
    assert again[0] == first[0]
    assert again[-1] == first[-1]
    assert len(running.engine.prompts) == 1
    code, _, details = await refusal(
        running.chat.Chat(chat_pb2.ChatRequest(message="other", request_id="r1"), metadata=ANN)
    )
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, ["REQUEST_ID_REUSED", "request_id"])
    # Another user's r1 is another request.
    assert (await chat(running, user=BOB, request_id="r1"))[0].started.response_id != first[0].started.response_id


async def test_a_thousand_duplicates_at_once_are_one_turn_and_one_vote(tmp_path: Path) -> None:
    async with running_server(tmp_path, user_calls=1000, user_rate=10_000) as running:
        answers = await asyncio.gather(*(chat(running, request_id="r1") for _ in range(100)))
        [response_id] = {events[0].started.response_id for events in answers}
        assert len(running.engine.prompts) == 1
        vote = feedback_pb2.SubmitThumbRequest(response_id=response_id, thumb=feedback_pb2.THUMB_UP, request_id="r2")
        votes = await asyncio.gather(*(running.feedback.SubmitThumb(vote, metadata=ANN) for _ in range(1000)))
        assert len({vote.feedback.feedback_id for vote in votes}) == 1
        assert await running.store(lambda store: store.snapshots.watermark()) == 1


async def test_a_comparison_hides_how_its_answers_differ_until_the_choice(running: Running) -> None:
    started, *events = await compare(running)
    finished = {event.finished.slot: event.finished for event in events if event.WhichOneof("event") == "finished"}
    assert set(finished) == {chat_pb2.SLOT_A, chat_pb2.SLOT_B}
    assert sorted(sampling.temperature for sampling in running.engine.samplings) == [0.7, 1.0]
    [turn] = await turns(running, started.started.conversation_id)
    for response in (turn.comparison.a, turn.comparison.b):
        assert not response.HasField("temperature")
        assert list(response.spans) == []
    choice = feedback_pb2.SubmitChoiceRequest(
        comparison_id=started.started.comparison_id, choice=feedback_pb2.CHOICE_B, comment="warmer"
    )
    vote = (await running.feedback.SubmitChoice(choice, metadata=ANN)).feedback
    assert (vote.comparison_id, vote.choice, vote.comment) == (choice.comparison_id, feedback_pb2.CHOICE_B, "warmer")
    [turn] = await turns(running, started.started.conversation_id)
    assert turn.comparison.continued_with == chat_pb2.SLOT_B
    assert turn.comparison.feedback == vote
    assert sorted([turn.comparison.a.temperature, turn.comparison.b.temperature]) == pytest.approx([0.7, 1.0])


async def test_the_slot_of_the_hotter_answer_is_random(running: Running) -> None:
    for _ in range(30):
        await compare(running)
    # The same order 30 times happens once in 5e8 runs.
    assert {sampling.temperature for sampling in running.engine.samplings[::2]} == {0.7, 1.0}


async def test_a_message_without_a_choice_continues_with_a(running: Running) -> None:
    started, *_ = await compare(running)
    await chat(running, "go on", conversation_id=started.started.conversation_id)
    first, _ = await turns(running, started.started.conversation_id)
    assert first.comparison.state == chat_pb2.COMPARISON_STATE_SKIPPED
    assert first.comparison.continued_with == chat_pb2.SLOT_A
    assert running.engine.encoded[-1][1] == {"role": "assistant", "content": "one two three four "}


async def test_a_repeated_compare_is_one_comparison(running: Running) -> None:
    first = await compare(running, request_id="r1")
    again = await compare(running, request_id="r1")
    assert again[0] == first[0]
    assert [event.finished.text for event in again if event.WhichOneof("event") == "finished"] == [
        "one two three four ",
        "one two three four ",
    ]
    assert len(running.engine.prompts) == 2


async def test_a_choice_on_an_unfinished_comparison_is_refused(running: Running) -> None:
    running.engine.hold_after = 1
    call = running.chat.Compare(chat_pb2.CompareRequest(message="hello"), metadata=ANN)
    started = await call.read()
    request = feedback_pb2.SubmitChoiceRequest(
        comparison_id=started.started.comparison_id, choice=feedback_pb2.CHOICE_A
    )
    code, _, details = await refusal(running.feedback.SubmitChoice(request, metadata=ANN))
    assert (code, details) == (grpc.StatusCode.FAILED_PRECONDITION, ["COMPARISON_UNFINISHED"])
    running.engine.go_on.set()
    await _end(call)
    await running.feedback.SubmitChoice(request, metadata=ANN)


async def test_feedback_is_listed_page_by_page_and_retracted(running: Running) -> None:
    started, *_ = await chat(running)
    thumb = feedback_pb2.SubmitThumbRequest(
        response_id=started.started.response_id, thumb=feedback_pb2.THUMB_DOWN, request_id="t1"
    )
    down = (await running.feedback.SubmitThumb(thumb, metadata=ANN)).feedback
    assert (await running.feedback.SubmitThumb(thumb, metadata=ANN)).feedback == down
    correction = feedback_pb2.SubmitCorrectionRequest(response_id=started.started.response_id, text="better")
    await running.feedback.SubmitCorrection(correction, metadata=ANN)
    messages = [
        feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content="hi"),
        feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content="hello"),
    ]
    await running.feedback.SubmitDemonstration(feedback_pb2.SubmitDemonstrationRequest(messages=messages), metadata=ANN)
    first = await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(page_size=2), metadata=ANN)
    assert [vote.WhichOneof("value") for vote in first.feedback] == ["demonstration", "correction"]
    assert list(first.feedback[0].demonstration.messages) == messages
    rest = await running.feedback.ListFeedback(
        feedback_pb2.ListFeedbackRequest(page_size=2, page_token=first.next_page_token), metadata=ANN
    )
    assert list(rest.feedback) == [down]
    assert rest.next_page_token == ""
    retract = feedback_pb2.RetractFeedbackRequest(feedback_id=down.feedback_id)
    code, *_ = await refusal(running.feedback.RetractFeedback(retract, metadata=BOB))
    assert code == grpc.StatusCode.NOT_FOUND
    await running.feedback.RetractFeedback(retract, metadata=ANN)
    listed = await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(), metadata=ANN)
    assert down.feedback_id not in {vote.feedback_id for vote in listed.feedback}


async def test_conversations_are_listed_page_by_page_and_deleted(running: Running) -> None:
    ids = [(await chat(running, f"question {n}"))[0].started.conversation_id for n in range(3)]
    first = await running.chat.ListConversations(chat_pb2.ListConversationsRequest(page_size=2), metadata=ANN)
    assert [found.title for found in first.conversations] == ["question 2", "question 1"]
    token = first.next_page_token
    rest = await running.chat.ListConversations(chat_pb2.ListConversationsRequest(page_token=token), metadata=ANN)
    assert [found.conversation_id for found in rest.conversations] == ids[:1]
    await running.chat.DeleteConversation(chat_pb2.DeleteConversationRequest(conversation_id=ids[0]), metadata=ANN)
    gone = running.chat.GetConversation(chat_pb2.GetConversationRequest(conversation_id=ids[0]), metadata=ANN)
    assert (await refusal(gone))[0] == grpc.StatusCode.NOT_FOUND


BAD_REQUESTS: list[tuple[str, str, Any, str]] = [
    ("chat", "Chat", chat_pb2.ChatRequest(message=" "), "message"),
    ("chat", "Chat", chat_pb2.ChatRequest(message="a" * 501), "message"),
    ("chat", "Chat", chat_pb2.ChatRequest(message="a", request_id="r" * 129), "request_id"),
    ("chat", "Chat", chat_pb2.ChatRequest(message="a", sampling={"temperature": 2.1}), "sampling.temperature"),
    ("chat", "Chat", chat_pb2.ChatRequest(message="a", sampling={"temperature": float("nan")}), "sampling.temperature"),
    ("chat", "Chat", chat_pb2.ChatRequest(message="a", sampling={"max_tokens": 0}), "sampling.max_tokens"),
    ("chat", "Chat", chat_pb2.ChatRequest(message="a", sampling={"max_tokens": 21}), "sampling.max_tokens"),
    ("chat", "Chat", chat_pb2.ChatRequest(message="a", sampling={"seed": 2**63}), "sampling.seed"),
    ("chat", "Compare", chat_pb2.CompareRequest(message="a", sampling={"temperature": 1}), "sampling.temperature"),
    ("chat", "ListConversations", chat_pb2.ListConversationsRequest(page_size=201), "page_size"),
    ("chat", "ListConversations", chat_pb2.ListConversationsRequest(page_token="x"), "page_token"),
    ("feedback", "SubmitThumb", feedback_pb2.SubmitThumbRequest(response_id="r"), "thumb"),
    ("feedback", "SubmitThumb", feedback_pb2.SubmitThumbRequest(response_id="r", thumb=9), "thumb"),
    ("feedback", "SubmitChoice", feedback_pb2.SubmitChoiceRequest(comparison_id="c"), "choice"),
    ("feedback", "SubmitChoice", feedback_pb2.SubmitChoiceRequest(choice=1), "comparison_id"),
    ("feedback", "SubmitCorrection", feedback_pb2.SubmitCorrectionRequest(response_id="r"), "text"),
    ("feedback", "SubmitDemonstration", feedback_pb2.SubmitDemonstrationRequest(), "messages"),
    ("policies", "ActivatePolicy", policy_pb2.ActivatePolicyRequest(), "version"),
    ("policies", "ActivatePolicy", policy_pb2.ActivatePolicyRequest(version="v0000", reason="a" * 501), "reason"),
    ("policies", "RollbackPolicy", policy_pb2.RollbackPolicyRequest(reason="a" * 501), "reason"),
    (
        "policies",
        "RollbackPolicy",
        policy_pb2.RollbackPolicyRequest(expected_active_version=""),
        "expected_active_version",
    ),
    ("policies", "CountVotes", policy_pb2.CountVotesRequest(days=367), "days"),
    ("policies", "ListRoundSamples", policy_pb2.ListRoundSamplesRequest(), "round_id"),
    ("policies", "ListRoundSamples", policy_pb2.ListRoundSamplesRequest(round_id="r", page_size=201), "page_size"),
]


@pytest.mark.parametrize(("service", "rpc", "request_", "field"), BAD_REQUESTS)
async def test_an_invalid_field_is_named(running: Running, service: str, rpc: str, request_: Any, field: str) -> None:
    code, _, details = await refusal(getattr(getattr(running, service), rpc)(request_, metadata=ANN))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details == ["INVALID_FIELD", field]


async def test_unknown_and_other_users_data_give_the_same_error(running: Running) -> None:
    started, *_ = await chat(running, user=BOB)
    for response_id in ("resp_unknown", started.started.response_id):
        thumb = feedback_pb2.SubmitThumbRequest(response_id=response_id, thumb=feedback_pb2.THUMB_UP)
        code, message, details = await refusal(running.feedback.SubmitThumb(thumb, metadata=ANN))
        assert (code, details) == (grpc.StatusCode.NOT_FOUND, ["NOT_FOUND"])
        assert message == f"There is no response {response_id!r}."


async def test_activation_serves_the_version_and_rollback_the_previous_one(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    activate = policy_pb2.ActivatePolicyRequest(version="v0001", expected_active_version="v0000")
    policy = (await running.policies.ActivatePolicy(activate, metadata=ANN)).policy
    assert (policy.version, policy.state) == ("v0001", policy_pb2.POLICY_STATE_ACTIVE)
    assert dict(policy.metrics) == {"win_rate": 0.75}
    assert running.engine.version == "v0001"
    active = await running.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), metadata=ANN)
    assert [(replica.loaded_version, replica.error) for replica in active.replicas] == [("v0001", "")]
    code, message, _ = await refusal(running.policies.ActivatePolicy(activate, metadata=ANN))
    assert (code, message) == (grpc.StatusCode.ABORTED, "v0001 is active, not v0000; nothing was changed.")
    back = (await running.policies.RollbackPolicy(policy_pb2.RollbackPolicyRequest(), metadata=ANN)).policy
    assert back.version == running.engine.version == "v0000"
    listed = await running.policies.ListPolicies(policy_pb2.ListPoliciesRequest(), metadata=ANN)
    assert [found.version for found in listed.policies] == ["v0001", "v0000"]
    # To a version that is named, and only to one that was active.
    there = policy_pb2.RollbackPolicyRequest(version="v0001")
    assert (await running.policies.RollbackPolicy(there, metadata=ANN)).policy.version == "v0001"
    await running.store(lambda store: register(store, "v0002"))
    publish_version(running.data_dir, "v0002")
    code, message, _ = await refusal(
        running.policies.RollbackPolicy(policy_pb2.RollbackPolicyRequest(version="v0002"), metadata=ANN)
    )
    assert (code, running.engine.version) == (grpc.StatusCode.FAILED_PRECONDITION, "v0001")
    assert "v0002 is candidate and was never active" in message


async def active(running: Running) -> Any:
    return await running.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), metadata=ANN)


async def test_a_rollback_announces_its_target_and_checks_the_active_version(running: Running) -> None:
    for version in ("v0001", "v0002"):
        publish_version(running.data_dir, version)
        await running.store(lambda store, v=version: register(store, v))
    assert (await active(running)).rollback_version == ""
    expecting = policy_pb2.RollbackPolicyRequest(expected_active_version="v0001")
    # Also without a version to go back to: the conflict is reported first.
    code, message, _ = await refusal(running.policies.RollbackPolicy(expecting, metadata=ANN))
    assert (code, message) == (grpc.StatusCode.ABORTED, "v0000 is active, not v0001; nothing was changed.")
    for version in ("v0001", "v0002"):
        await running.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version=version), metadata=ANN)
    assert (await active(running)).rollback_version == "v0001"
    code, message, _ = await refusal(running.policies.RollbackPolicy(expecting, metadata=ANN))
    assert (code, message) == (grpc.StatusCode.ABORTED, "v0002 is active, not v0001; nothing was changed.")
    expecting.expected_active_version = "v0002"
    assert (await running.policies.RollbackPolicy(expecting, metadata=ANN)).policy.version == "v0001"
    # v0002 was rolled back, so another rollback does not activate it.
    assert (await active(running)).rollback_version == "v0000"


async def test_two_rollbacks_at_once_go_back_one_step(running: Running) -> None:
    for version in ("v0001", "v0002"):
        publish_version(running.data_dir, version)
        await running.store(lambda store, v=version: register(store, v))
        await running.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version=version), metadata=ANN)
    request = policy_pb2.RollbackPolicyRequest()
    # Both have read the active version before either moves it.
    looked, step = [], Policies.rollback_step
    both = asyncio.Event()

    def look(*arguments: Any) -> Any:
        looked.append(arguments)
        if len(looked) == 2:
            loop.call_soon_threadsafe(both.set)
        return step(*arguments)

    locate = running.engine.locate

    def wait(*arguments: Any) -> Any:
        asyncio.run_coroutine_threadsafe(both.wait(), loop).result(10)
        return locate(*arguments)

    loop = asyncio.get_running_loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policies, "rollback_step", look)
        patch.setattr(running.engine, "locate", wait)
        calls = [running.policies.RollbackPolicy(request, metadata=user) for user in (ANN, BOB)]
        ended = await asyncio.gather(*calls, return_exceptions=True)
    refused = [error for error in ended if isinstance(error, grpc.aio.AioRpcError)]
    assert [error.code() for error in refused] == [grpc.StatusCode.ABORTED]
    assert running.engine.version == "v0001"


async def test_every_move_is_stored_with_a_reason(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    for reason in ("", "  ", "I read its answers"):
        activate = policy_pb2.ActivatePolicyRequest(version="v0001", reason=reason)
        await running.policies.ActivatePolicy(activate, metadata=ANN)
        back = policy_pb2.RollbackPolicyRequest(reason=reason and f"{reason}, again ")
        await running.policies.RollbackPolicy(back, metadata=ANN)
    moves = await running.store(lambda store: store.lineage.moves(6))
    assert [(move.action, move.actor, move.reason) for move in reversed(moves)] == [
        ("activate", "ann", "activated by RPC"),
        ("rollback", "ann", "rolled back from v0001"),
        ("activate", "ann", "activated by RPC"),
        ("rollback", "ann", ", again"),
        ("activate", "ann", "I read its answers"),
        ("rollback", "ann", "I read its answers, again"),
    ]


async def test_votes_of_all_users_are_counted_by_utc_day_and_kind(running: Running) -> None:
    voters = (ANN, BOB, ANN, ANN, BOB, ANN)
    response_ids = [(await chat(running, user=user))[0].started.response_id for user in voters]
    for user, response_id in zip(voters, response_ids, strict=True):
        thumb = feedback_pb2.SubmitThumbRequest(response_id=response_id, thumb=feedback_pb2.THUMB_UP)
        kept = (await running.feedback.SubmitThumb(thumb, metadata=user)).feedback.feedback_id
    correction = feedback_pb2.SubmitCorrectionRequest(response_id=response_ids[0], text="so")
    await running.feedback.SubmitCorrection(correction, metadata=ANN)
    await running.feedback.RetractFeedback(feedback_pb2.RetractFeedbackRequest(feedback_id=kept), metadata=ANN)

    def spread(store: Store) -> list[str]:
        # A second before today began, 29 and 30 days before today; two thumbs and the correction are today's.
        ids = [row["id"] for row in store._db.rows("SELECT id FROM feedback WHERE kind = 'thumb' ORDER BY event_seq")]
        for feedback_id, seconds in zip(ids[1:4], (-1, -29 * 86400, -30 * 86400), strict=True):
            store._db.execute(
                "UPDATE feedback SET create_time = unixepoch('now', 'start of day') + ? WHERE id = ?",
                [seconds, feedback_id],
            )
        days = ", ".join(f"date('now', '-{days} days') AS day{days}" for days in (0, 1, 29, 30))
        return list(store._db.rows(f"SELECT {days}")[0].values())

    today, yesterday, in_window, before = await running.store(spread)

    async def counted(days: int) -> list[tuple[str, int, int]]:
        found = await running.policies.CountVotes(policy_pb2.CountVotesRequest(days=days), metadata=ANN)
        return [(count.date, count.kind, count.votes) for count in found.counts]

    thumb_kind, correction_kind = feedback_pb2.FEEDBACK_KIND_THUMB, feedback_pb2.FEEDBACK_KIND_CORRECTION
    now = [(today, correction_kind, 1), (today, thumb_kind, 2)]
    assert await counted(1) == now
    assert await counted(2) == [(yesterday, thumb_kind, 1), *now]
    assert await counted(0) == await counted(30) == [(in_window, thumb_kind, 1), (yesterday, thumb_kind, 1), *now]
    assert (await counted(366))[0] == (before, thumb_kind, 1)


async def test_a_disconnected_caller_does_not_interrupt_a_swap(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    running.engine.may_swap.clear()
    request = policy_pb2.ActivatePolicyRequest(version="v0001")
    call = running.policies.ActivatePolicy(request, metadata=ANN, timeout=0.3)
    assert await failure(call) == grpc.StatusCode.DEADLINE_EXCEEDED
    running.engine.may_swap.set()
    async with asyncio.timeout(10):
        while running.engine.version != "v0001":
            await asyncio.sleep(0)
    assert running.engine.swaps == 1


async def test_a_stream_continues_over_a_swap_and_its_spans_say_where(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    running.engine.hold_after = 3
    streaming = asyncio.create_task(chat(running))
    await running.engine.holding.wait()
    # As the learner does it: the pointer moves in the store, and the server follows.
    await running.store(lambda store: store.policies.activate("v0001", actor="learner"))
    async with asyncio.timeout(10):
        while running.engine.version != "v0001":
            await asyncio.sleep(0)
    running.engine.go_on.set()
    started, *_, finished = await streaming
    assert (started.started.policy_version, finished.finished.policy_version) == ("v0000", "v0001")
    [turn] = await turns(running, started.started.conversation_id)
    spans = [(span.start, span.end, span.policy_version) for span in turn.response.spans]
    assert spans == [(0, 3, "v0000"), (3, 4, "v0001")]


def truncate(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 20)


def reseal(directory: Path, tensors: dict[str, Any]) -> None:
    (directory / "manifest.json").unlink()
    save_file(tensors, directory / "model.safetensors")
    write_manifest(directory, version="v0001", kind="full", base_version="v0001", reference_version="v0000")


A, B = np.zeros((2, 3), np.float32), np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "v0001/model.safetensors does not have the SHA-256 that its manifest lists."),
        (
            lambda path: (path / "manifest.json").unlink(),
            "v0001 has no manifest.json, so it is not a published version.",
        ),
        (lambda path: (path / "manifest.json").write_text("{"), "v0001/manifest.json is not a valid manifest."),
        (lambda path: (path / "extra.pt").write_text(""), "v0001 has extra.pt, which its manifest does not list."),
        (lambda path: (path / "model.safetensors").unlink(), "v0001 lacks model.safetensors."),
        (lambda path: reseal(path, {"a": A}), "v0001 lacks the tensor b."),
        (lambda path: reseal(path, {"a": A, "b": A}), "v0001: b has shape [2, 3], but the engine needs [4]."),
        (
            lambda path: reseal(path, {"a": A, "b": B, "c": B}),
            "v0001 has the tensor c, which the engine does not expect.",
        ),
    ],
)
async def test_a_damaged_version_is_refused_and_the_old_one_stays_active(
    running: Running, damage: Any, reason: str
) -> None:
    damage(publish_version(running.data_dir, "v0001"))
    await running.store(lambda store: register(store, "v0001"))
    call = running.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version="v0001"), metadata=ANN)
    code, message, details = await refusal(call)
    assert (code, message, details) == (grpc.StatusCode.FAILED_PRECONDITION, reason, ["POLICY_UNLOADABLE"])
    active = await running.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), metadata=ANN)
    assert (active.policy.version, running.engine.version) == ("v0000", "v0000")
    assert (await chat(running))[-1].finished.text == "one two three four "


async def test_a_version_the_engine_refuses_is_marked_failed_and_the_pointer_goes_back(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    running.engine.bad.add("v0001")
    call = running.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version="v0001"), metadata=ANN)
    code, message, _ = await refusal(call)
    assert (code, message) == (grpc.StatusCode.FAILED_PRECONDITION, "v0001: v0001: a tensor is not finite")
    failed = await running.store(lambda store: store.policies.get("v0001"))
    assert (failed.state, failed.reason) == ("failed", "v0001: a tensor is not finite")
    assert (await running.store(lambda store: store.policies.active())).version == "v0000"


async def test_a_rollback_without_a_previous_version_is_refused(running: Running) -> None:
    code, _, details = await refusal(running.policies.RollbackPolicy(policy_pb2.RollbackPolicyRequest(), metadata=ANN))
    assert (code, details) == (grpc.StatusCode.FAILED_PRECONDITION, ["NOTHING_TO_ROLL_BACK"])


async def test_health_is_serving_and_then_not(running: Running) -> None:
    health = health_pb2_grpc.HealthStub(running.channel)
    watching = health.Watch(health_pb2.HealthCheckRequest(service=""))
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
    running.engine.hold_after = 2
    streaming = asyncio.create_task(chat(running))
    await running.engine.holding.wait()
    stopping = asyncio.create_task(running.app.stop(10))
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watching.cancel()
    # The open stream finishes within the grace; a new call is refused.
    late = running.chat.Chat(chat_pb2.ChatRequest(message="late"), metadata=ANN)
    assert await failure(late) == grpc.StatusCode.UNAVAILABLE
    running.engine.go_on.set()
    assert (await streaming)[-1].finished.text == "one two three four "
    await stopping


async def test_a_stream_that_outlasts_the_grace_is_stored(running: Running) -> None:
    running.engine.hold_after = 2
    call = running.chat.Chat(chat_pb2.ChatRequest(message="hello"), metadata=ANN)
    started = await call.read()
    await running.engine.holding.wait()
    await running.app.stop(0)
    response = await running.store(lambda store: store.responses.get("ann", started.started.response_id))
    assert (response.status, response.text, response.spans[0].end) == ("cancelled", "one two ", 2)


async def test_a_store_that_fails_acknowledges_nothing(running: Running) -> None:
    started, *_ = await chat(running)
    await running.store(lambda store: store._db.execute("PRAGMA query_only = ON"))
    thumb = feedback_pb2.SubmitThumbRequest(
        response_id=started.started.response_id, thumb=feedback_pb2.THUMB_UP, request_id="t"
    )
    code, message, details = await refusal(running.feedback.SubmitThumb(thumb, metadata=ANN))
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, ["STORE_UNAVAILABLE"])
    assert "Nothing from this call was stored" in message
    await running.store(lambda store: store._db.execute("PRAGMA query_only = OFF"))
    # Recovered without a restart, and the same request_id now goes through.
    await running.feedback.SubmitThumb(thumb, metadata=ANN)


async def test_an_answer_that_leaves_no_room_for_its_message_is_refused(running: Running) -> None:
    running.engine.max_model_len = 12
    assert await refusal(chat(running, sampling={"max_tokens": 12})) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "sampling.max_tokens must be below 12, the model's limit for a message and its answer together.",
        ["INVALID_FIELD", "sampling.max_tokens"],
    )


async def test_feedback_longer_than_the_context_is_refused(running: Running) -> None:
    started, *_ = await chat(running, "hello there")
    # Forty tokens in all: two of the prompt, one of the end.
    for words, taken in ((37, True), (38, False)):
        correction = feedback_pb2.SubmitCorrectionRequest(
            response_id=started.started.response_id, text=" ".join(["word"] * words)
        )
        call = running.feedback.SubmitCorrection(correction, metadata=ANN)
        if taken:
            assert (await call).feedback.correction == correction.text
        else:
            assert await refusal(call) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "text must have at most 38 tokens here, not 39.",
                ["INVALID_FIELD", "text"],
            )
    messages = [
        feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content=" ".join(["word"] * 30)),
        feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content=" ".join(["word"] * 10)),
    ]
    demonstration = feedback_pb2.SubmitDemonstrationRequest(messages=messages)
    assert (await refusal(running.feedback.SubmitDemonstration(demonstration, metadata=ANN)))[1] == (
        "messages must have at most 40 tokens here, not 41."
    )


async def test_text_with_a_token_that_the_model_lacks_is_refused(running: Running) -> None:
    started, *_ = await chat(running, "hello there")
    what = "the token '<late>', for which this model has no embedding."

    def lacking(*arguments: Any, **named: Any) -> list[int]:
        raise UnknownTokenError("<late>")

    running.engine.encode = running.engine.encode_answer = lacking  # type: ignore[method-assign]
    sampled = len(running.engine.prompts)
    response_id = started.started.response_id
    asked = feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content="so <late>")
    answered = feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content="so")
    for call, sentence, field in (
        (chat(running, "so <late>"), f"The message has {what}", "message"),
        (
            running.feedback.SubmitCorrection(
                feedback_pb2.SubmitCorrectionRequest(response_id=response_id, text="so <late>"), metadata=ANN
            ),
            f"text has {what}",
            "text",
        ),
        (
            running.feedback.SubmitDemonstration(
                feedback_pb2.SubmitDemonstrationRequest(messages=[asked, answered]), metadata=ANN
            ),
            f"messages have {what}",
            "messages",
        ),
    ):
        assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, sentence, ["INVALID_FIELD", field])
    assert len(running.engine.prompts) == sampled


async def test_messages_that_the_template_rejects_are_refused(running: Running) -> None:
    def refuse(messages: list[dict[str, str]], began: float) -> list[int]:
        raise ValueError("Conversation roles must alternate user/assistant/user/assistant/...")

    running.engine.encode = refuse  # type: ignore[method-assign]
    part = feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content="so")
    call = running.feedback.SubmitDemonstration(
        feedback_pb2.SubmitDemonstrationRequest(messages=[part, part]), metadata=ANN
    )
    assert await refusal(call) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "messages are in an order that the model's chat template does not accept.",
        ["INVALID_FIELD", "messages"],
    )


async def test_a_text_that_cannot_fit_is_not_encoded(running: Running) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("it was encoded")

    running.engine.encode = running.engine.encode_answer = never  # type: ignore[method-assign]
    part = feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content="x" * 321)
    call = running.feedback.SubmitDemonstration(
        feedback_pb2.SubmitDemonstrationRequest(messages=[part, part]), metadata=ANN
    )
    assert (await refusal(call))[:2] == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "messages must have at most 40 tokens, but has 642 characters.",
    )


async def test_a_message_may_name_a_live_version(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    running.engine.live = {"v0001"}
    listed = await running.chat.ListVersions(chat_pb2.ListVersionsRequest(), metadata=ANN)
    assert [one.policy_version for one in listed.versions] == ["v0000", "v0001"]
    assert all(one.create_time.seconds > 0 for one in listed.versions)
    started, *_, last = await chat(running, policy_version="v0001")
    assert (started.started.policy_version, last.finished.policy_version) == ("v0001", "v0001")
    assert [(span.start, span.end, span.policy_version) for span in last.finished.spans] == [(0, 4, "v0001")]
    await chat(running)
    assert running.engine.pinned == ["v0001", None]
    call = running.chat.Chat(chat_pb2.ChatRequest(message="hi", policy_version="v0007"), metadata=ANN)
    assert (await refusal(call))[:2] == (grpc.StatusCode.NOT_FOUND, "There is no live version 'v0007'.")
