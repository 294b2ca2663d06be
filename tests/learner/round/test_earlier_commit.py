"""A data directory that commit a51ccdf left: it is opened and served, its round is resumed, and it is rolled back.

tests/fixtures/a51ccdf.tar.gz was made by that commit with its tests' helpers: a tiny model, 80 votes, a round that they
promoted, 20 votes more and a round that was killed (SIGKILL) in the second step of PPO, and an answer that its server
never finished. TensorBoard's files were taken out.
"""

import tarfile
from pathlib import Path

import pytest
from rich.console import Console

import learner.round.gate.gate_stage as gate_stage
import learner.round.run as rounds
import learner.round.workspace as workspace
from learner.ops.status import status
from learner.progress import Stages
from server.app import App
from server.engine.weights import engine_weights
from server.settings import ServerSettings
from server.store.learning.round_metrics import WinRate
from server.store.store import Store
from server.store.store_thread import StoreThread
from tests.learner.rounds import TinyEngine, passing, settings
from tests.server.fakes import FakeEngine


@pytest.fixture
def a51ccdf(root: Path, tmp_path: Path) -> Path:
    with tarfile.open(root / "tests" / "fixtures" / "a51ccdf.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "a51ccdf"


def test_it_opens_and_its_rounds_keep_their_metrics(a51ccdf: Path) -> None:
    store = Store.open(a51ccdf)
    running, promoted = store.rounds.page()
    assert (promoted.state, promoted.policy_version, promoted.reward_model_version) == ("promoted", "v0001", "rm0001")
    assert (running.state, running.stage, running.attempts) == ("running", "reward_model", 1)
    assert promoted.settings["policy"] == {
        "train": "lora", "start_from": "reference", "lora_rank": 4, "lora_alpha": 32, "micro_batch_tokens": 1024,
        "mismatch_limit": 0.35, "kl_budget": 6.0, "kl_total": 6.0, "checkpoint_activations": "off",
        "kl_per_token": 1e9,
    }  # fmt: skip
    metrics = promoted.metrics
    assert metrics.votes
    assert (metrics.votes.choices, metrics.votes.left_out, metrics.votes.quarantined) == (80, 0, 0)
    assert metrics.improvement
    assert ([step.step for step in metrics.improvement.steps], metrics.improvement.candidates) == ([0, 1], [1, 2])
    assert metrics.gate
    assert (metrics.gate.chosen.step, type(metrics.gate.chosen.against_incumbent)) == (2, WinRate)
    assert metrics.reward_model
    assert metrics.seconds
    assert dict(status(a51ccdf, 10, 10)["lines"])
    store.close()


async def test_it_is_served_and_interrupted_answers_are_marked(a51ccdf: Path) -> None:
    store, engine = StoreThread(a51ccdf), FakeEngine()
    app = App(ServerSettings.load(data_dir=a51ccdf, port=0, poll_seconds=0.01), store)
    await app.start(engine)
    try:
        assert engine.version == "v0001"
        # The engine's weights are made from the adapter again.
        assert (engine_weights(a51ccdf, "v0001", "float32") / "model.safetensors").exists()
        [turn] = await store(lambda store: store.conversations.turns("bob", store.conversations.page("bob")[0].id))
        assert turn.response
        assert turn.response.status == "failed"
    finally:
        await app.stop(0)
        await store.close()


def test_the_killed_round_resumes_and_rolls_back(a51ccdf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "RolloutEngine", TinyEngine)
    monkeypatch.setattr(gate_stage, "decide", passing)
    begun = Store.open(a51ccdf).rounds.running()
    assert begun
    report = rounds.run_once(settings(a51ccdf), Stages(Console(quiet=True)))
    assert (report.state, report.round_id, report.policy_version) == ("promoted", begun.id, "v0002"), report.sentence
    # The first step is the one that the earlier commit made; only the second was made now.
    assert report.metrics.improvement
    assert [step.step for step in report.metrics.improvement.steps] == [0, 1]
    store = Store.open(a51ccdf)
    assert store.policies.active().version == "v0002"
    assert store.policies.rollback_step() == ("v0002", "v0001")
    store.policies.activate("v0001", actor="ann", action="rollback", expected_active_version="v0002")
    assert store.policies.active().version == "v0001"
    store.close()
