"""The metrics, where they are served, and that they name no user."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefloop.v1 import chat_pb2, feedback_pb2, policy_pb2
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.store.learning.records import Round
from server.store.learning.round_metrics import RewardModelMetrics, RoundMetrics, VoteCounts
from server.store.store import Store
from server.telemetry import metrics
from server.telemetry.metrics_http import MetricsServer
from server.telemetry.round_metrics import figures, show_disk, show_rounds
from tests.round_metrics import candidate_metrics, filled, gate_metrics
from tests.server.conftest import Running, publish_version, register
from tests.server.rpc.test_rpcs import ANN, chat, compare, failure


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


@contextmanager
def rise(name: str, by: float, **labels: str) -> Iterator[None]:
    before = value(name, **labels)
    yield
    assert value(name, **labels) - before == by, (name, labels)


async def test_calls_answers_and_tokens_are_counted(running: Running) -> None:
    with (
        rise("prefloop_calls_total", 2, rpc="Chat", code="OK"),
        rise("prefloop_call_seconds_count", 2, rpc="Chat"),
        rise("prefloop_first_token_seconds_count", 2),
        rise("prefloop_token_seconds_count", 2),
        rise("prefloop_tokens_total", 8, kind="answer"),
        rise("prefloop_tokens_total", 4, kind="prompt"),
    ):
        await chat(running)
        await chat(running)
    assert value("prefloop_answers") == 0
    assert value("prefloop_answers_sampled_at_once") == 64


async def test_a_running_answer_is_counted(running: Running) -> None:
    running.engine.hold_after = 1
    call = running.chat.Compare(chat_pb2.CompareRequest(message="hi"), metadata=ANN)
    await running.engine.holding.wait()
    assert value("prefloop_answers") == 2
    running.engine.go_on.set()
    assert len([event async for event in call]) == 11
    assert value("prefloop_answers") == 0


async def test_a_call_that_failed_is_counted_by_its_status(running: Running) -> None:
    with (
        rise("prefloop_calls_total", 1, rpc="Chat", code="INVALID_ARGUMENT"),
        rise("prefloop_calls_total", 1, rpc="GetConversation", code="NOT_FOUND"),
        rise("prefloop_calls_total", 0, rpc="Chat", code="OK"),
    ):
        await failure(running.chat.Chat(chat_pb2.ChatRequest(), metadata=ANN))
        await failure(running.chat.GetConversation(chat_pb2.GetConversationRequest(conversation_id="x"), metadata=ANN))


async def test_a_vote_is_counted_once_however_often_it_is_sent(running: Running) -> None:
    started, *_ = await chat(running)
    thumb = feedback_pb2.SubmitThumbRequest(
        response_id=started.started.response_id, thumb=feedback_pb2.THUMB_DOWN, request_id="r1"
    )
    compared, *_ = await compare(running)
    choice = feedback_pb2.SubmitChoiceRequest(
        comparison_id=compared.started.comparison_id, choice=feedback_pb2.CHOICE_TIE
    )
    correction = feedback_pb2.SubmitCorrectionRequest(response_id=started.started.response_id, text="better")
    with (
        rise("prefloop_votes_total", 1, kind="thumb", value="DOWN"),
        rise("prefloop_votes_total", 1, kind="choice", value="TIE"),
        rise("prefloop_votes_total", 1, kind="correction", value=""),
    ):
        for _ in range(3):
            await running.feedback.SubmitThumb(thumb, metadata=ANN)
        await running.feedback.SubmitChoice(choice, metadata=ANN)
        await running.feedback.SubmitCorrection(correction, metadata=ANN)


async def test_swaps_and_the_version_that_is_loaded(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    publish_version(running.data_dir, "v0002")
    for version in ("v0001", "v0002"):
        await running.store(lambda store, version=version: register(store, version))
    running.engine.bad.add("v0002")
    with rise("prefloop_swaps_total", 1, result="done"), rise("prefloop_swaps_total", 1, result="refused"):
        await running.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version="v0001"), metadata=ANN)
        await failure(running.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version="v0002"), metadata=ANN))
    assert value("prefloop_active_policy", version="v0001") == 1
    assert metrics.REGISTRY.get_sample_value("prefloop_active_policy", {"version": "v0000"}) is None


ROUND = Round(
    id="round_1",
    state="promoted",
    stage="activate",
    watermark=9,
    incumbent_version="v0000",
    reference_version="v0000",
    policy_version="v0001",
    reward_model_version="rm0001",
    settings={},
    metrics=RoundMetrics(
        votes=filled(VoteCounts, train=30, judge=12),
        reward_model=filled(RewardModelMetrics, accuracy=0.75),
        gate=gate_metrics(candidate_metrics(1, kl=4.5, rate=0.8)),
    ),
    reason="",
    create_time=100.0,
    finish_time=160.0,
)


def test_a_rounds_metrics() -> None:
    assert figures(ROUND) == {
        "votes": 42, "reward_accuracy": 0.75, "kl": 4.5, "win_rate": 0.8, "seconds": 60.0, "finish_time": 160.0,
    }  # fmt: skip
    refused = figures(replace(ROUND, metrics=RoundMetrics(votes=ROUND.metrics.votes)))
    assert refused["votes"] == 42
    assert [refused[name] == refused[name] for name in ("reward_accuracy", "kl", "win_rate")] == [False] * 3


def test_the_newest_finished_round_is_shown(store: Store) -> None:
    lease = store.leases.acquire("learner", "me", 60.0)
    assert lease
    first, second = (store.rounds.create(0, {}, reference_version="v0000", fence=lease) for _ in range(2))
    for round_, votes in ((first, 1), (second, 2)):
        store.rounds.update(round_.id, metrics=RoundMetrics(votes=filled(VoteCounts, train=votes)), fence=lease)
    store.rounds.finish(first.id, "rejected", reason="no", fence=lease)
    show_rounds(store)
    assert value("prefloop_round", figure="votes") == 1
    assert value("prefloop_rounds", state="rejected") == 1
    assert value("prefloop_rounds", state="running") == 1


def test_activations_and_the_disk_are_shown(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(store, "v0001")
    store.policies.activate("v0001", actor="olga", action="promote")
    store.policies.activate("v0000", actor="olga", action="rollback")
    store.policies.activate("v0001", actor="olga", action="promote")
    show_rounds(store)
    assert store.policies.activations() == {"promote": 2, "rollback": 1}
    assert value("prefloop_activations", action="promote") == 2
    assert value("prefloop_activations", action="rollback") == 1
    # Shown before it happens: an alert needs a rise.
    for name, labels in (("prefloop_activations", {"action": "fail"}), ("prefloop_rounds", {"state": "failed"})):
        assert metrics.REGISTRY.get_sample_value(name, labels) == 0.0
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: SimpleNamespace(free=3, total=8) if path == tmp_path else None
    )
    show_disk(tmp_path)
    assert value("prefloop_disk_bytes", kind="free") == 3
    assert value("prefloop_disk_bytes", kind="total") == 8


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_and_health_over_http() -> None:
    serving = False
    metrics_server = MetricsServer("127.0.0.1", 0, lambda: serving)
    try:
        base = f"http://127.0.0.1:{metrics_server.port}"
        assert get(f"{base}/healthz") == (503, "NOT_SERVING\n")
        serving = True
        assert get(f"{base}/healthz") == (200, "SERVING\n")
        status, text = get(f"{base}/metrics")
        assert status == 200
        assert "prefloop_serving" in {family.name for family in text_string_to_metric_families(text)}
        assert get(f"{base}/data")[0] == 404
        with pytest.raises(OSError, match="in use"):
            MetricsServer("127.0.0.1", metrics_server.port, lambda: serving)
    finally:
        metrics_server.close()


async def test_no_metric_names_a_user_or_what_was_said(running: Running) -> None:
    user = (("x-user-id", "marguerite"),)
    started, *_ = await chat(running, "confidential", user=user)
    for name in ("confidential", "marguerite", started.started.response_id, started.started.conversation_id):
        assert name not in generate_latest(metrics.REGISTRY).decode()


def dashboard(root: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((root / "deploy/grafana/prefloop.json").read_text())
    return board


def test_the_dashboard_uses_existing_metrics_and_labels(root: Path) -> None:
    samples = {"process_resident_memory_bytes", "process_open_fds", "process_max_fds"}
    labels: dict[str, set[str]] = {}
    for metric in metrics.REGISTRY.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        samples |= {metric.name + suffix for suffix in suffixes}
    for collector in vars(metrics).values():
        if hasattr(collector, "_labelnames"):
            labels[collector._name] = {*collector._labelnames, "le"}
    asked = {target["expr"] for panel in dashboard(root)["panels"] for target in panel["targets"]}
    used = {name for expression in asked for name in re.findall(r"\b(?:prefloop|process)_\w+", expression)}
    assert used <= samples
    for expression in asked:
        [base, *_] = [
            name for name in labels if re.search(rf"\b{name}(_total|_bucket|_sum|_count)?\b", expression)
        ] or [""]
        named = re.findall(r"\{(\w+)=", expression) + [
            name for group in re.findall(r"by \(([^)]*)\)", expression) for name in group.split(", ")
        ]
        assert set(named) <= labels.get(base, set()), expression
    # Every metric is also on the dashboard.
    assert {name for name in labels if not any(re.search(rf"\b{name}(_|\b)", one) for one in used)} == set()
