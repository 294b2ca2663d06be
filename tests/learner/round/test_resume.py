"""A learner that is killed (SIGKILL, no cleanup) is resumed and ends with the same bytes as one that was not killed.

Each case is a process of its own that kills itself as it is about to make a named call: before a stage is recorded, in
the middle of a PPO step, between a candidate and the state, between a directory's writing and its rename, after the
pointer moved. All begin from one copy of one begun round, so that they share its time and its votes.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from learner.progress import Stages
from learner.round.report import Report
from learner.round.run import run_once
from server.store.learning.records import RoundKind
from server.store.store import Store
from tests.learner.round.test_sft import demonstrate
from tests.learner.rounds import TinyEngine, passing, settings
from tests.tiers import slow

SECONDS = 120
# Imported once, in a process that has never computed: a fork of this one would inherit OpenMP's dead threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["learner.round.run", "learner.model.policy", "peft", "transformers", "tests.learner.rounds"]
)


# As many steps as PPO's, and at least two optimiser steps in each.
TRAINING: dict[str, dict[str, Any]] = {
    "ppo": {"steps": 4, "episodes": 16, "learning_rate": 3e-3, "epochs": 2},
    "rloo": {"steps": 4, "episodes": 16, "learning_rate": 3e-3, "epochs": 2},
    "dpo": {"steps": 4, "episodes": 16, "learning_rate": 3e-3, "votes": 16},
    "sft": {"epochs": 4, "batch": 4, "learning_rate": 3e-3},
}


def run(data_dir: Path, dtype: str = "float32", said: Path | None = None, improver: str = "ppo") -> Report:
    """Runs a round by an improver; `sft` is a round of its own kind."""
    import learner.round.gate.gate_stage
    import learner.round.workspace

    learner.round.workspace.RolloutEngine = TinyEngine  # type: ignore[assignment, misc]
    learner.round.gate.gate_stage.decide = passing
    kind: RoundKind = "sft" if improver == "sft" else "alignment"
    training = {improver: TRAINING[improver], **({"improver": improver} if kind == "alignment" else {})}
    with said.open("w") if said else nullcontext() as file:
        console = Console(file=file, width=200, quiet=file is None)
        return run_once(settings(data_dir, dtype=dtype, **training), Stages(console), kind=kind)


def before_call(call: str, count: int, act: Callable[[], object]) -> None:
    """Makes this process call `act` just before its `count`th `call` (`module:name`)."""
    module, _, path = call.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for step in owners:
        owner = getattr(owner, step)
    original, calls = getattr(owner, name), [0]

    def acting(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            act()
        return original(*arguments, **named)

    setattr(owner, name, acting)


def run_until(data_dir: Path, call: str, count: int, improver: str) -> None:
    """Runs a round in this process and kills the process there."""
    before_call(call, count, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(data_dir, improver=improver)


def killed(data_dir: Path, call: str, count: int, improver: str = "ppo") -> None:
    process = PROCESSES.Process(target=run_until, args=(data_dir, call, count, improver))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def begun(voted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory whose round was killed before anything was recorded."""
    data_dir = tmp_path_factory.mktemp("begun") / "data"
    shutil.copytree(voted, data_dir)
    killed(data_dir, "learner.round.workspace:Workspace.record", 1)
    return data_dir


@pytest.fixture(scope="module")
def unbroken(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data_dir = tmp_path_factory.mktemp("unbroken") / "data"
    shutil.copytree(begun, data_dir)
    process = PROCESSES.Process(target=run, args=(data_dir,))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    return outcome(data_dir)


def outcome(data_dir: Path) -> dict[str, Any]:
    """Everything a round leaves that does not depend on how long it took."""
    store = Store.open(data_dir)
    try:
        [round_] = store.rounds.page()
        active = store.policies.active()
        versions = [policy.version for policy in store.policies.page()]
        reward_models = [model.version for model in store.reward_models.all()]
    finally:
        store.close()
    assert round_.state == "promoted"
    weights = sorted((data_dir / "policies" / "v0001").glob("*.safetensors"))
    weights += (data_dir / "reward_models" / "rm0001").glob("*.safetensors")
    answers = (data_dir / "rounds" / round_.id / "answers.jsonl").read_text().splitlines()
    return {
        "active": active.version,
        "versions": versions,
        "reward_models": reward_models,
        "metrics": replace(round_.metrics, seconds={}),
        "weights": {path.name: path.read_bytes() for path in weights},
        "answers": [json.loads(line) for line in answers],
        "left": sorted(path.name for path in data_dir.rglob("*.partial"))
        + sorted(path.name for path in (data_dir / "rounds" / round_.id).iterdir() if path.is_dir()),
    }


# The sample has one of each stage, and of PPO the middle of a step and of a state.
@pytest.mark.parametrize(
    ("call", "count"),
    [
        slow("learner.round.workspace:Workspace.record", 2),  # before the signal's metrics
        ("server.store.files.manifest:publish", 1),  # the reward model written, not yet renamed
        slow("server.store.learning.reward_models:RewardModels.register", 1),
        slow("learner.round.workspace:Workspace.record", 3),  # before the reward model is recorded
        slow("learner.improve.training:policy_logprobs", 1),  # the first step, before any state
        ("learner.improve.ppo.trainer:ppo_update", 3),  # the third step
        slow("learner.improve.training:save_state", 3),  # a candidate without its state
        ("server.store.files.manifest:publish", 4),  # a state written, not yet renamed
        slow("learner.improve.state:drop_states", 3),  # two states
        slow("learner.round.workspace:Workspace.record", 4),  # before PPO is recorded
        ("learner.round.gate.gate_stage:keep_answers", 1),
        slow("learner.round.workspace:Workspace.record", 5),  # before the gate is recorded
        slow("server.store.files.manifest:publish", 6),  # the version is written, not yet renamed
        slow("server.store.learning.policies:Policies.register", 1),
        slow("server.store.learning.policies:Policies.activate", 1),
        ("learner.round.publish:wait_until_loaded", 1),  # the pointer has moved
        slow("learner.round.workspace:drop_states", 1),
        slow("learner.round.workspace:drop_candidates", 1),
        slow("server.store.learning.rounds:Rounds.finish", 1),
    ],
)
def test_a_killed_round_ends_as_an_unbroken_one(
    begun: Path, unbroken: dict[str, Any], tmp_path: Path, call: str, count: int
) -> None:
    shutil.copytree(begun, tmp_path / "data")
    killed(tmp_path / "data", call, count)
    process = PROCESSES.Process(target=run, args=(tmp_path / "data",))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    assert outcome(tmp_path / "data") == unbroken
    assert unbroken["versions"] == ["v0001", "v0000"]
    assert unbroken["left"] == []


@pytest.mark.parametrize(
    ("improver", "call"),
    [("rloo", "learner.improve.rloo.trainer:update_policy"), ("dpo", "learner.improve.dpo.trainer:step_metrics")],
)
def test_a_round_by_another_improver_ends_as_an_unbroken_one(
    voted: Path, tmp_path: Path, improver: str, call: str
) -> None:
    """Killed in the third step: as it begins its update, and with the update made but not saved."""
    begun, found = tmp_path / "begun", []
    shutil.copytree(voted, begun)
    killed(begun, "learner.round.workspace:Workspace.record", 1, improver)
    for name in ("unbroken", "killed"):
        data_dir = tmp_path / name
        shutil.copytree(begun, data_dir)
        if name == "killed":
            killed(data_dir, call, 3, improver)
            assert [path.name for path in data_dir.glob("rounds/*/state-*")] == ["state-002"]
        process = PROCESSES.Process(target=run, args=(data_dir,))
        process.start()
        process.join(SECONDS)
        assert process.exitcode == 0
        found.append(outcome(data_dir))
    assert found[0] == found[1]
    steps = found[0]["metrics"].improvement.steps
    assert [step.step for step in steps] == [0, 1, 2, 3]
    assert abs(steps[3].kl) > 1e-3


@pytest.mark.parametrize(
    ("call", "count", "left"),
    [
        slow("learner.improve.sft.trainer:token_logprobs", 5, ["state-003"]),  # in the third pass
        ("learner.improve.sft.trainer:save_state", 3, ["state-003"]),  # weights without their state
        slow("learner.improve.state:drop_states", 3, ["state-003", "state-004"]),  # two states
        slow("learner.round.workspace:Workspace.record", 2, ["state-005"]),  # before the training is recorded
        slow("learner.round.sft.gate_stage:keep_answers", 1, ["state-005"]),
        slow("server.store.files.manifest:publish", 5, ["state-005"]),  # the version is written, not yet renamed
        slow("server.store.learning.policies:Policies.register", 1, ["state-005"]),
        slow("learner.round.publish:wait_until_loaded", 1, ["state-005"]),  # the pointer has moved
    ],
)
def test_a_killed_round_of_demonstrations_ends_as_an_unbroken_one(
    voted: Path, tmp_path: Path, call: str, count: int, left: list[str]
) -> None:
    begun, found = tmp_path / "begun", []
    shutil.copytree(voted, begun)
    demonstrate(begun, 10)
    killed(begun, "learner.round.workspace:Workspace.record", 1, "sft")
    for name in ("unbroken", "killed"):
        data_dir = tmp_path / name
        shutil.copytree(begun, data_dir)
        if name == "killed":
            killed(data_dir, call, count, "sft")
            assert sorted(path.name for path in data_dir.glob("rounds/*/state-*")) == left
        process = PROCESSES.Process(target=run, args=(data_dir, "float32", None, "sft"))
        process.start()
        process.join(SECONDS)
        assert process.exitcode == 0
        found.append(outcome(data_dir))
    assert found[0] == found[1]
    assert (found[0]["active"], found[0]["left"]) == ("v0001", [])
    assert len(found[0]["metrics"].sft.epochs) == 5


@pytest.mark.slow
def test_a_demonstration_that_was_deleted_meanwhile_is_not_learned_from(voted: Path, tmp_path: Path) -> None:
    """What was trained so far knew it, and starts over."""
    data_dir = tmp_path / "data"
    shutil.copytree(voted, data_dir)
    demonstrate(data_dir, 10)
    demonstrate(data_dir, 1, first=30, user="eve")
    killed(data_dir, "learner.improve.sft.trainer:token_logprobs", 7, "sft")
    [state] = data_dir.glob("rounds/*/state-*")
    before = json.loads((state / "figures.json").read_text())
    store = Store.open(data_dir)
    while store.deletion.step("eve"):
        pass
    store.close()
    process = PROCESSES.Process(target=run, args=(data_dir, "float32", None, "sft"))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    store = Store.open(data_dir)
    [round_] = store.rounds.page()
    store.close()
    assert round_.metrics.sft
    assert (round_.state, round_.metrics.sft.demonstrations) == ("promoted", 10)
    assert [epoch.number for epoch in round_.metrics.sft.epochs] == [0, 1, 2, 3, 4]
    assert round_.metrics.sft.epochs[1].loss != before[1]["loss"]


def test_dpo_starts_over_if_votes_were_deleted_since(voted: Path, tmp_path: Path) -> None:
    """Its states belong to votes by number, and to bars of users."""
    data_dir = tmp_path / "data"
    shutil.copytree(voted, data_dir)
    killed(data_dir, "learner.improve.dpo.trainer:step_metrics", 3, "dpo")
    [state] = data_dir.glob("rounds/*/state-002")
    store = Store.open(data_dir)
    [round_] = store.rounds.page()
    sides = store.lineage.round_votes(round_.id)
    trains = next(vote for vote in store.snapshots.take().choices if sides[vote.feedback_id] == "train")
    store.conversations.delete("ann", trains.a.conversation_id)
    store.close()
    before = (state / "figures.json").read_text()
    process = PROCESSES.Process(target=run, args=(data_dir,))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    store = Store.open(data_dir)
    [round_] = store.rounds.page()
    store.close()
    assert round_.state == "promoted"
    assert round_.metrics.improvement
    steps = round_.metrics.improvement.steps
    assert [step.step for step in steps] == [0, 1, 2, 3]
    # The first step was made again, on other votes.
    assert steps[0].policy_loss != json.loads(before)[0]["policy_loss"]


def test_a_round_that_continues_in_another_dtype_restarts_training(begun: Path, tmp_path: Path) -> None:
    """As on another machine: no step in one dtype may follow a step in the other."""
    data_dir, said = tmp_path / "data", tmp_path / "said"
    shutil.copytree(begun, data_dir)
    killed(data_dir, "learner.improve.ppo.trainer:ppo_update", 3)
    assert [path.name for path in data_dir.glob("rounds/*/state-*")] == ["state-002"]
    process = PROCESSES.Process(target=run, args=(data_dir, "bfloat16", said))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    assert "it began in float32 and continues in bfloat16; training starts over\n" in said.read_text()
    store = Store.open(data_dir)
    [round_] = store.rounds.page()
    store.close()
    assert (round_.state, round_.settings["dtype"]) == ("promoted", "bfloat16")
    # The first step's log-probabilities are rounded, so it was not taken from the float32 state.
    assert [step.step for step in round_.metrics.improvement.steps] == [0, 1, 2, 3]
    assert round_.metrics.improvement.steps[0].mismatch_rms > 1e-3
    weights = load_file(data_dir / "policies" / "v0001" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def run_with(environment: dict[str, str], data_dir: Path) -> None:
    os.environ.update(environment)
    run(data_dir)


def test_a_round_from_an_earlier_version_keeps_its_settings(
    begun: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    """With settings and metrics as commit a51ccdf stores them, and other settings in the environment."""
    data_dir = tmp_path / "data"
    shutil.copytree(begun, data_dir)
    killed(data_dir, "learner.improve.ppo.trainer:ppo_update", 3)
    store = Store.open(data_dir)
    [round_] = store.rounds.page()
    settings = dict(round_.settings)
    settings["gpu_memory_share"] = settings.pop("learner_gpu_memory_share")
    settings["duel_user_votes"] = settings.pop("ab_test_user_votes")
    assert settings["policy"].pop("checkpoint_activations") == "off"
    assert settings["policy"].pop("kl_total") == 12.0
    assert settings["policy"].pop("kl_per_token") == 10.0
    settings["ppo"] = {**settings["ppo"], **settings.pop("policy"), "dtype": settings.pop("dtype")}
    with store._db.write():
        values = [json.dumps(settings), json.dumps(round_.metrics.to_json())]
        assert store._db.execute("UPDATE rounds SET settings = ?, metrics = ?", values) == 1
    store.close()
    environment = {"PREFLOOP_SEED": "7", "PREFLOOP_LEARNER_GPU_MEMORY_SHARE": "0.9", "PREFLOOP_PPO__KL_TARGET": "1"}
    process = PROCESSES.Process(target=run_with, args=(environment, data_dir))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0
    assert outcome(data_dir) == unbroken
