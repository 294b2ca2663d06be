"""A round that does not fit into memory is not begun; one that fits only just saves memory, to its end."""

import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import learner.round.alignment.stages as alignment
import learner.round.begin as module
import learner.round.gate.gate_stage as judging
import learner.round.run as rounds
import learner.round.workspace as workspace
from learner.model.checkpointing import checkpointed
from learner.progress import Stages
from learner.round.begin import plan_memory, too_little_memory
from learner.settings import LearnerSettings
from server.shared.errors import FailedPreconditionError
from server.shared.machine import GIB, Machine
from server.shared.model.load import UntrustedCodeError
from server.store.chats.records import Prompt
from server.store.learning.records import Round
from server.store.store import Store
from tests.learner.rounds import TinyEngine, passing, settings
from tests.server.reference.test_reference import give_code

PROMPTS = [Prompt("c", [5] * 20, 12), Prompt("d", [5] * 60, 48), Prompt("e", [5] * 200, 64)]
CPU = torch.device("cpu")


def memory(monkeypatch: pytest.MonkeyPatch, total: float, free: float) -> None:
    machine = Machine(frozenset({0, 1}), 2.0, int(total * GIB), int(free * GIB))
    monkeypatch.setattr(module, "read_machine", lambda: machine)


def plan(model: Path, **policy: Any) -> module.MemoryPlan:
    return plan_memory(LearnerSettings(dtype="float32", policy=policy), model, PROMPTS, CPU)


def test_memory_is_saved_only_where_it_is_short(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 16, 12)
    assert not plan(model_directory).checkpoint
    assert plan(model_directory, checkpoint_activations="on").checkpoint
    assert str(plan(model_directory)) == (
        "needs about 2.6 GiB of memory, 12.0 GiB are free; activations are kept for the backward pass"
    )
    memory(monkeypatch, 16, 2)
    assert plan(model_directory).checkpoint
    assert not plan(model_directory, checkpoint_activations="off").checkpoint
    assert plan(model_directory).need.activations < plan(model_directory, checkpoint_activations="off").need.activations
    assert str(plan(model_directory)) == (
        "needs about 2.6 GiB of memory, 2.0 GiB are free; activations are computed again in the backward pass"
    )


def test_the_longest_row_that_a_round_reads_counts(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row longer than a micro-batch goes alone. The model has 128 positions: the longest is left out."""
    memory(monkeypatch, 16, 12)

    def activations(tokens: int) -> int:
        return plan(model_directory, micro_batch_tokens=tokens).need.activations

    assert activations(1) == activations(108)
    assert activations(216) == 2 * activations(108)


def test_memory_is_planned_for_a_model_with_its_own_code_if_that_is_trusted(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, 16, 12)
    model = shutil.copytree(model_directory, tmp_path / "model")
    give_code(model)
    with pytest.raises(UntrustedCodeError):
        plan(model)
    trusting = LearnerSettings(dtype="float32", trust_remote_code=True)
    assert plan_memory(trusting, model, PROMPTS, CPU) == plan(model_directory)


def test_too_little_memory_is_a_sentence_with_advice(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 2, 1)
    learner = LearnerSettings(dtype="float32")
    found = plan_memory(learner, model_directory, PROMPTS, CPU)
    assert too_little_memory(found, learner) == (
        "A round needs about 2.6 GiB of memory (2.5 GiB for its engine, 0.1 GiB for the weights and what steps them, "
        "0.0 GiB for the longest answers), more than the 2.0 GiB here: use a smaller model or a larger machine. "
        "Nothing was changed."
    )
    big = replace(found, need=replace(found.need, trainer=30 * GIB, activations=20 * GIB))
    full = LearnerSettings(policy={"train": "full", "checkpoint_activations": "off"})
    assert str(too_little_memory(big, full)).endswith(
        ": set policy.checkpoint_activations to auto, or train adapters instead of all weights, or lower "
        "policy.micro_batch_tokens, or use a smaller model or a larger machine. Nothing was changed."
    )
    assert too_little_memory(replace(found, total=4 * GIB), learner) is None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "RolloutEngine", TinyEngine)
    monkeypatch.setattr(judging, "decide", passing)


def the_round(data_dir: Path) -> Round:
    store = Store.open(data_dir)
    [found] = store.rounds.page()
    store.close()
    return found


@pytest.mark.usefixtures("engine")
def test_a_round_that_does_not_fit_is_not_begun(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 2, 2)
    report = rounds.run_once(settings(data_dir), Stages(Console(quiet=True)))
    assert (report.state, report.sentence[:33]) == ("nothing", "A round needs about 2.6 GiB of me")
    store = Store.open(data_dir)
    assert store.rounds.page() == []
    store.close()
    # So the same votes begin one on a larger machine.
    memory(monkeypatch, 16, 12)
    monkeypatch.setattr(rounds, "return_large_blocks", lambda: pytest.fail("memory is not short"))
    assert rounds.run_once(settings(data_dir), Stages(Console(quiet=True))).state == "promoted"
    assert the_round(data_dir).settings["policy"]["checkpoint_activations"] == "off"


@pytest.mark.usefixtures("engine")
def test_a_round_keeps_its_decision_when_it_is_resumed(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def interrupted(work: workspace.Workspace, *_: Any) -> None:
        found.append(checkpointed(work.policy.model))
        raise KeyboardInterrupt

    memory(monkeypatch, 16, 2)
    said = StringIO()
    returned: list[bool] = []
    monkeypatch.setattr(rounds, "return_large_blocks", lambda: returned.append(True))
    with monkeypatch.context() as patch:
        patch.setattr(alignment, "improve_policy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rounds.run_once(settings(data_dir), Stages(Console(file=said, width=200)))
    assert "activations are computed again in the backward pass\n" in said.getvalue()
    assert the_round(data_dir).settings["policy"]["checkpoint_activations"] == "on"
    memory(monkeypatch, 16, 12)
    judge = alignment.judge_candidates

    def noticing(work: workspace.Workspace, *rest: Any) -> Any:
        found.append(checkpointed(work.policy.model))
        return judge(work, *rest)

    monkeypatch.setattr(alignment, "judge_candidates", noticing)
    assert rounds.run_once(settings(data_dir), Stages(Console(quiet=True))).state == "promoted"
    assert found == returned == [True, True]


@pytest.mark.parametrize(
    ("family", "train", "sentence"),
    [
        (
            "gpt_oss",
            "full",
            "A model of the family gpt_oss cannot be trained in full: vLLM 0.32 drops the weights of its experts when "
            "weights are loaded again. Set policy.train to lora.",
        ),
        (
            "phimoe",
            "lora",
            'A model of the family phimoe cannot learn: vLLM 0.32 cannot run it: "too many values to unpack (expected '
            '3)". Nothing was changed.',
        ),
    ],
)
def test_a_family_that_cannot_learn_is_refused_before_anything_is_spent(
    family: str, train: str, sentence: str, data_dir: Path
) -> None:
    path = data_dir / "policies" / "v0000" / "config.json"
    path.write_text(path.read_text().replace('"model_type": "llama"', f'"model_type": "{family}"'))
    with pytest.raises(FailedPreconditionError) as refused:
        rounds.run_once(settings(data_dir, policy={"train": train}), Stages(Console(quiet=True)))
    assert str(refused.value) == sentence
    assert Store.open(data_dir).rounds.page() == []


def test_workers_on_one_machine_need_its_memory_together(model_directory: Path) -> None:
    alone = plan(model_directory).need

    def need(**workers: Any) -> Any:
        return plan_memory(LearnerSettings(dtype="float32", workers=workers), model_directory, PROMPTS, CPU).need

    assert need(count=2) == alone.of_workers(2, together=True)
    assert need(count=2, ray="10.0.0.1:6379") == alone.of_workers(2, together=False)
    assert need(count=2).engine == 2 * alone.engine
