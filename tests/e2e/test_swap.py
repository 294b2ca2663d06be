"""Streams, cancellation and swaps on the real engine."""

import itertools
import os
import select
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prefloop.v1 import chat_pb2, policy_pb2
from transformers import AutoModelForCausalLM

from learner.model.forward import run_trunk, to_tokens, token_logprobs
from server.store.chats.loading import load_responses
from server.store.store import Store
from tests.e2e.conftest import LiveServer, children, engine, live_server
from tests.tiers import slow
from tests.versions import Tensors, make_version

pytestmark = pytest.mark.e2e

LONG = "Write a long story about a lighthouse."


def scale_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"] *= 0.5


def negate_norm(tensors: Tensors) -> None:
    # Negates every logit, so that even greedy answers differ.
    tensors["model.norm.weight"] *= -1


def roll_words(tensors: Tensors) -> None:
    # Every word gets the vector of the one before it; the first few are special.
    words = tensors["model.embed_tokens.weight"]
    words[8:] = words[8:].roll(1, dims=0)


def spoil(tensors: Tensors) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"][7, 7] = float("nan")


def drop(tensors: Tensors) -> None:
    del tensors["model.layers.3.mlp.up_proj.weight"]


def crop(tensors: Tensors) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()


def ask(live: LiveServer, message: str, **sampling: Any) -> tuple[Any, str, Any]:
    """The started event, the deltas joined, and the finished event."""
    request = chat_pb2.ChatRequest(message=message, sampling=chat_pb2.SamplingOptions(**sampling))
    events = list(live.chat.Chat(request, timeout=120))
    return events[0].started, "".join(event.delta.text for event in events[1:-1]), events[-1].finished


def spans(live: LiveServer, started: Any) -> list[tuple[int, int, str, bool]]:
    request = chat_pb2.GetConversationRequest(conversation_id=started.conversation_id)
    [turn] = live.chat.GetConversation(request, timeout=10).conversation.turns
    return [(span.start, span.end, span.policy_version, span.stale_kv) for span in turn.response.spans]


def activate(live: LiveServer, version: str) -> None:
    live.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version=version), timeout=60)


def test_a_default_server_answers(default: LiveServer) -> None:
    started, streamed, finished = ask(default, "What is the capital of Japan?", temperature=0, max_tokens=24)
    assert streamed == finished.text
    # The first words are far from a tie, so they survive bfloat16 rounding, which differs between processors.
    assert "The capital of Japan is Tokyo" in finished.text
    assert spans(default, started) == [(0, finished.usage.completion_tokens, "v0000", False)]


def test_every_sampled_token_is_stored_with_its_logprob(live: LiveServer) -> None:
    started, _, finished = ask(live, "Name a colour.", temperature=0.7, max_tokens=12, seed=3)
    store = Store.open(live.data_dir)
    response = load_responses(store._db, [started.response_id])[started.response_id]
    store.close()
    assert len(response.token_ids) == len(response.logprobs) == finished.usage.completion_tokens
    assert all(logprob <= 0 for logprob in response.logprobs)
    assert (response.seed, round(response.temperature, 3), response.max_tokens) == (3, 0.7, 12)


def test_an_answer_ends_before_a_stop_sequence(live: LiveServer) -> None:
    _, _, whole = ask(live, "Name a colour.", temperature=0, max_tokens=24)
    stop = whole.text[7:10]
    started, streamed, finished = ask(live, "Name a colour.", temperature=0, max_tokens=24, stop=[stop])
    assert finished.finish_reason == chat_pb2.FINISH_REASON_STOP_SEQUENCE
    assert streamed == finished.text == whole.text[: whole.text.index(stop)]
    with closing(Store.open(live.data_dir)) as store:
        response = load_responses(store._db, [started.response_id])[started.response_id]
    # The tokens are those of the text, without what came next.
    count = len(response.token_ids)
    assert 1 <= count == len(response.logprobs) == finished.usage.completion_tokens < whole.usage.completion_tokens
    assert [(span.start, span.end) for span in response.spans] == [(0, count)]


def test_a_version_with_other_words_answers_as_it_was_trained(live: LiveServer) -> None:
    """All weights may change, also those of a matrix that the model reads words and predicts words by."""
    version = make_version(live.data_dir, roll_words)
    activate(live, version)
    try:
        started, _, _ = ask(live, "Name a colour.", temperature=0.7, max_tokens=12, seed=3)
    finally:
        activate(live, "v0000")
    with closing(Store.open(live.data_dir)) as store:
        response = load_responses(store._db, [started.response_id])[started.response_id]
    tokens = to_tokens([response.prompt_token_ids], [response.token_ids])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(live.data_dir / "policies" / version, dtype=torch.float32)
        own = token_logprobs(model, run_trunk(model, tokens)[0], tokens, 0.7)
    # In bfloat16 the two differ by some hundredths; by the old words they would by whole nats.
    assert (own[0] - torch.tensor(response.logprobs)).abs().mean() < 0.3


def test_a_cancelled_answer_keeps_its_tokens_and_spans(live: LiveServer) -> None:
    call = live.chat.Chat(chat_pb2.ChatRequest(message=LONG, sampling={"max_tokens": 400}))
    started = next(call).started
    for _ in range(5):
        next(call)
    call.cancel()
    # The next call in the same conversation waits until the cancelled answer is stored.
    follow_up = chat_pb2.ChatRequest(
        conversation_id=started.conversation_id, message="Go on.", sampling={"max_tokens": 1}
    )
    list(live.chat.Chat(follow_up, timeout=60))
    request = chat_pb2.GetConversationRequest(conversation_id=started.conversation_id)
    first, _ = live.chat.GetConversation(request, timeout=10).conversation.turns
    assert first.response.finish_reason == chat_pb2.FINISH_REASON_CANCELLED
    tokens = first.response.usage.completion_tokens
    assert 5 <= tokens < 400
    assert [(span.start, span.end, span.policy_version) for span in first.response.spans] == [(0, tokens, "v0000")]


def test_streams_carry_on_over_swaps_and_every_token_has_one_version(live: LiveServer) -> None:
    version = make_version(live.data_dir, scale_norm)
    with ThreadPoolExecutor(8) as pool:
        calls = [live.chat.Chat(chat_pb2.ChatRequest(message=LONG, sampling={"max_tokens": 200})) for _ in range(8)]
        openings = [next(call).started for call in calls]
        for call in calls:
            next(call)
        reading = [pool.submit(list, call) for call in calls]
        activate(live, version)
        endings = [read.result(timeout=120)[-1].finished for read in reading]
    crossed = 0
    for started, finished in zip(openings, endings, strict=True):
        assert finished.finish_reason in (chat_pb2.FINISH_REASON_STOP, chat_pb2.FINISH_REASON_LENGTH)
        found = spans(live, started)
        assert found[0][0] == 0
        assert found[-1][1] == finished.usage.completion_tokens
        assert all(left[1] == right[0] for left, right in itertools.pairwise(found))
        assert [span[2] for span in found] in (["v0000"], ["v0000", version])
        assert not any(span[3] for span in found)
        crossed += len(found) == 2
    assert crossed >= 4
    activate(live, "v0000")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (spoil, "not finite"),
        (drop, "lacks the tensor"),
        (crop, "has shape"),
        ("truncated", "not a valid safetensors file"),
        ("tampered", "does not have the SHA-256 that its manifest lists"),
    ],
)
def test_unusable_weights_leave_the_old_policy_serving(
    live: LiveServer, damage: Callable[[Tensors], None] | str, reason: str
) -> None:
    before = ask(live, "Name three colours.", temperature=0, max_tokens=24)[1]
    if isinstance(damage, str):
        version = make_version(live.data_dir, negate_norm, truncated=damage == "truncated")
    else:
        version = make_version(live.data_dir, damage)
    if damage == "tampered":
        with (live.data_dir / "policies" / version / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
    with pytest.raises(grpc.RpcError) as error:
        activate(live, version)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert reason in error.value.details()
    started, after, _ = ask(live, "Name three colours.", temperature=0, max_tokens=24)
    assert after == before
    assert started.policy_version == "v0000"


def test_swapping_there_and_back_restores_the_answers(live: LiveServer) -> None:
    before = ask(live, "Why is the sky blue?", temperature=0, max_tokens=24)[1]
    activate(live, make_version(live.data_dir, negate_norm))
    assert ask(live, "Why is the sky blue?", temperature=0, max_tokens=24)[1] != before
    activate(live, "v0000")
    # The prefix cache of the other weights must not be used either.
    assert ask(live, "Why is the sky blue?", temperature=0, max_tokens=24)[1] == before


def reason_of(live: LiveServer, version: str) -> str:
    listed = live.policies.ListPolicies(policy_pb2.ListPoliciesRequest(), timeout=10).policies
    [found] = [policy for policy in listed if policy.version == version]
    assert found.state == policy_pb2.POLICY_STATE_FAILED
    return str(found.reason)


@pytest.fixture
def failing(model: str, tmp_path: Path) -> Iterator[LiveServer]:
    """A server whose engine dies in its first swap."""
    with live_server(tmp_path / "data", model, PREFLOOP_FAILPOINT="exchange:1") as server:
        yield server


@pytest.mark.slow
def test_an_engine_that_dies_in_a_swap_comes_back_with_the_old_policy(failing: LiveServer) -> None:
    live = failing
    before = ask(live, "Name three colours.", temperature=0, max_tokens=24)[1]
    version = make_version(live.data_dir, negate_norm)
    with pytest.raises(grpc.RpcError) as error:
        live.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version=version), timeout=240)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert f"the engine died while it loaded {version}" in error.value.details()
    assert f"the engine died while it loaded {version}" in reason_of(live, version)
    assert f"the engine died while it loaded {version}" in "".join(live.log)
    started, after, _ = ask(live, "Name three colours.", temperature=0, max_tokens=24)
    assert (after, started.policy_version) == (before, "v0000")


@pytest.mark.parametrize(
    ("blow", "seconds", "complaint"),
    [
        (signal.SIGKILL, (0, 2), "the engine died"),
        slow(signal.SIGSTOP, (9, 12), "the engine's process has not run for 10 s; it was killed"),
    ],
)
def test_an_engine_that_dies_or_hangs_comes_back_with_what_it_served(
    live: LiveServer, blow: signal.Signals, seconds: tuple[int, int], complaint: str
) -> None:
    version = make_version(live.data_dir, negate_norm)
    activate(live, version)
    before = ask(live, "Name three colours.", temperature=0, max_tokens=24)[1]
    call = live.chat.Chat(chat_pb2.ChatRequest(message=LONG, sampling={"max_tokens": 400}), timeout=240)
    cut_off = next(call).started
    watching = health_pb2_grpc.HealthStub(live.channel).Watch(health_pb2.HealthCheckRequest(), timeout=240)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert next(watching).status == serving
    struck = time.monotonic()
    os.kill(engine(live), blow)
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert next(watching).status == not_serving
    assert seconds[0] < time.monotonic() - struck < seconds[1]
    assert next(watching).status == serving
    assert complaint in "".join(live.log)
    watching.cancel()
    asked = chat_pb2.GetConversationRequest(conversation_id=cut_off.conversation_id)
    [turn] = live.chat.GetConversation(asked).conversation.turns
    assert (turn.message, turn.response.finish_reason) == (LONG, chat_pb2.FINISH_REASON_ERROR)
    started, after, _ = ask(live, "Name three colours.", temperature=0, max_tokens=24)
    assert (after, started.policy_version) == (before, version)
    activate(live, "v0000")


def test_an_engine_that_starts_again_takes_no_weights_that_rotted_meanwhile(live: LiveServer) -> None:
    before = ask(live, "Name three colours.", temperature=0, max_tokens=24)[1]
    version = make_version(live.data_dir, negate_norm)
    activate(live, version)
    weights = live.data_dir / "policies" / version / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.kill(engine(live), signal.SIGKILL)
    live.hear(f"{version} cannot be served; v0000 stays loaded")
    started, after, _ = ask(live, "Name three colours.", temperature=0, max_tokens=24)
    assert (after, started.policy_version) == (before, "v0000")
    assert f"{version}/model.safetensors does not have the SHA-256" in reason_of(live, version)


def test_what_happened_is_in_the_metrics(live: LiveServer) -> None:
    version = make_version(live.data_dir, negate_norm)
    activate(live, version)
    ask(live, "Name a colour.", max_tokens=4)
    with urllib.request.urlopen(live.metrics_url, timeout=10) as reply:
        lines = dict(line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if not line.startswith("#"))
    assert lines[f'prefloop_active_policy{{version="{version}"}}'] == "1.0"
    assert lines["prefloop_serving"] == "1.0"
    assert float(lines['prefloop_swap_seconds_sum{stage="gap"}']) > 0
    assert float(lines['prefloop_tokens_total{kind="answer"}']) >= 4
    activate(live, "v0000")
    with urllib.request.urlopen(live.metrics_url.replace("/metrics", "/healthz"), timeout=10) as reply:
        assert reply.status == 200


def test_a_stop_ends_streams_in_the_grace_and_every_process(live: LiveServer) -> None:
    below = [os.pidfd_open(pid) for pid in children(live.process.pid)]
    assert len(below) >= 2
    version = make_version(live.data_dir, scale_norm)
    call = live.chat.Chat(chat_pb2.ChatRequest(message=LONG, sampling={"max_tokens": 60}))
    started = next(call).started
    live.process.terminate()
    *_, last = list(call)
    assert last.finished.usage.completion_tokens > 0
    assert live.stop() == 0
    # A process descriptor becomes readable when the process ends; the last one is Python's own resource tracker.
    for process in below:
        assert select.select([process], [], [], 10)[0]
        os.close(process)
    # The engine logged no exception when it ended.
    assert "Exception ignored" not in "".join(live.log)
    # The pointer moves while the server is down; at its start the server follows the pointer.
    store = Store.open(live.data_dir)
    assert load_responses(store._db, [started.response_id])[started.response_id].status == "finished"
    assert store.replicas.alive() == []
    store.policies.activate(version, actor="learner")
    store.close()
    live.start()
    assert ask(live, "Name a colour.", max_tokens=4)[0].policy_version == version
    activate(live, "v0000")
