"""The check before a round: engine and trainer must be one policy, also after weights were pushed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.model.engine_check import check_engine
from learner.model.policy import TrainablePolicy
from server.store.chats.records import Prompt
from tests.learner.rounds import TinyEngine, settings

PROMPTS = [Prompt("", [3 + number, 7, 9, 11], 12) for number in range(8)]


def made(directory: Path, train: Any, engine: type[TinyEngine] = TinyEngine) -> tuple[TrainablePolicy, Any, Any]:
    chosen = settings(directory, policy={"train": train, "lora_rank": 4, "micro_batch_tokens": 1024})
    policy = TrainablePolicy.create(directory, chosen.policy, torch.float32, torch.device("cpu"))
    return policy, engine(directory, chosen, "float32", 64), chosen


@pytest.mark.parametrize("train", ["lora", "full"])
def test_an_engine_that_agrees_passes_and_both_have_the_reference_again(train: Any, model_directory: Path) -> None:
    policy, engine, chosen = made(model_directory, train)
    check_engine(policy, engine, PROMPTS, chosen)
    expected = dict(policy.reference_weights())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in policy.engine_weights())
    held = engine.model.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("lost", ["", "mlp.down_proj", "layers.2.self_attn.q_proj", "layers.0.mlp.gate_proj"])
def test_a_push_that_arrives_not_at_all_or_in_part_is_refused(train: Any, lost: str, model_directory: Path) -> None:
    class Deaf(TinyEngine):
        def push(self, weights: Iterator[tuple[str, Tensor]]) -> None:
            super().push((name, tensor) for name, tensor in weights if lost not in name)

    policy, engine, chosen = made(model_directory, train, Deaf)
    with pytest.raises(RuntimeError, match=r"After weights were pushed, the engine computes this model \(llama\)"):
        check_engine(policy, engine, PROMPTS, chosen)
    assert all(torch.equal(mine, theirs[1]) for (_, mine), theirs in zip(
        policy.engine_weights(), policy.reference_weights(), strict=True
    ))  # fmt: skip


def test_an_engine_that_computes_otherwise_is_refused(model_directory: Path) -> None:
    policy, engine, chosen = made(model_directory, "lora")
    # As vLLM does for a family whose scale it does not know.
    engine.model.lm_head.register_forward_hook(lambda _module, _input, logits: logits * 1.05)
    with pytest.raises(RuntimeError, match=r"^The engine computes this model \(llama\) otherwise than the trainer"):
        check_engine(policy, engine, PROMPTS, chosen)


def test_a_policy_whose_changes_change_nothing_is_refused(model_directory: Path) -> None:
    policy, engine, chosen = made(model_directory, "lora")
    policy.model.base_model.model.lm_head.register_forward_hook(lambda _module, _input, logits: logits * 0)
    engine.model.lm_head.register_forward_hook(lambda _module, _input, logits: logits * 0)
    with pytest.raises(RuntimeError, match="do not change this model's answers: it cannot learn"):
        check_engine(policy, engine, PROMPTS, chosen)
