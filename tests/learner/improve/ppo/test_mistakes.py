"""Mistakes that others shipped, by the issue that found them; each test fails when the mistake is made here.

Others of the kind are kept where the code they concern is tested: ratio 1 on the first minibatch (trl #454) and the
push that did not land (ART #661) in test_policy, the score on the last token (trl #3750) and one mean over micro-
batches (verl #906) in test_advantages and test_ppo, padding and positions (OpenRLHF #217) in test_forward, NaN where
masked (OpenRLHF #1240) in test_ppo, raw or altered sampling (trl #4159, #235, NeMo-RL #69) and stale keys and values
(vllm #9744) on the real engine in tests/e2e.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from learner.improve.ppo.advantages import last_token, whiten
from learner.improve.training import replace_cut
from learner.improve_settings import PolicySettings, PPOSettings
from learner.model.features import pool
from learner.model.forward import response_states, run_trunk, to_tokens
from learner.model.passes import policy_logprobs
from learner.model.policy import TrainablePolicy
from learner.model.rollout import SampledAnswer, to_rollout
from learner.round.workspace import Workspace
from server.store.files.manifest import new_version
from tests.learner.conftest import EOS

CPU = torch.device("cpu")


def sample(prompt: list[int], token_ids: list[int], reason: str, text: str = "") -> SampledAnswer:
    return SampledAnswer(prompt, token_ids, [0.0] * len(token_ids), text, reason)


def test_dropout_is_off_while_logprobs_are_taken(model_directory: Path, tmp_path: Path) -> None:
    """trl #744."""
    shutil.copytree(model_directory, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    assert '"attention_dropout": 0.5' in config.read_text()
    policy = TrainablePolicy.create(tmp_path / "model", PolicySettings(lora_rank=4), torch.float32, CPU)
    tokens = to_tokens([[5, 6, 7, 8]], [[9, 10, 11, EOS]])
    first = policy_logprobs(policy, tokens, 1.0, 1)
    assert torch.equal(policy_logprobs(policy, tokens, 1.0, 1), first)


def test_an_eos_in_the_prompt_does_not_end_the_answer() -> None:
    """trl #6805."""
    rollout = to_rollout([sample([5, EOS, 6], [7, 8], "length"), sample([5], [7, EOS], "stop")])
    assert rollout.ended.tolist() == [False, True]
    assert last_token(rollout.tokens.response_mask).tolist() == [1, 1]


def test_the_eos_is_part_of_what_is_scored(model: Any) -> None:
    """A reward model that trains on answers with their EOS and scores them without it sees another answer."""

    def features(response: list[int]) -> torch.Tensor:
        tokens = to_tokens([[5, 6]], [response])
        _, states = run_trunk(model, tokens, (1, 3))
        return pool(response_states(states, tokens), tokens.response_mask)

    with_eos, without = features([7, 8, EOS]), features([7, 8])
    assert not torch.allclose(with_eos, without)
    assert with_eos[0, -1].item() == pytest.approx(1.098612, abs=1e-6)  # log 3: it counts in the length, too


def test_an_adapter_is_refused_as_the_reference(tmp_path: Path) -> None:
    """trl #1340: with adapters off the base answers, which is the reference only where the reference has no adapter."""
    with new_version(tmp_path / "v0001", kind="adapter", reference_version="v0000") as staging:
        (staging / "adapter_model.safetensors").write_bytes(b"")
    work: Any = SimpleNamespace(
        round=SimpleNamespace(reference_version="v0001"), policy_directory=lambda version: tmp_path / version
    )
    with pytest.raises(ValueError, match="v0001 is an adapter"):
        Workspace.reference_directory.func(work)  # type: ignore[attr-defined]


def test_replaced_scores_are_kept_out_of_score_statistics() -> None:
    """AReaL #1351: the statistics read the reward model's scores, which a replacement leaves as they are."""
    rollout = to_rollout([sample([5], [7, EOS], "stop"), sample([5], [7, 8], "length")])
    raw = torch.tensor([0.5, 0.7])
    assert replace_cut(raw, rollout, -9.0).tolist() == [0.5, -9.0]
    assert raw.mean().item() == pytest.approx(0.6)


def test_sampled_ids_are_trained_on_whatever_their_text_would_be_split_into() -> None:
    """SkyRL #123."""
    rollout = to_rollout([sample([5], [7, 7, 8], "length", text="w9")])
    assert rollout.tokens.response_ids.tolist() == [[7, 7, 8]]
    assert rollout.tokens.input_ids.tolist() == [[5, 7, 7, 8]]


def test_advantages_that_are_all_alike_are_zero_and_one_sample_is_no_batch() -> None:
    """MetaClaw #47."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert whiten(torch.full((2, 3), 0.7), mask).abs().max().item() < 1e-2
    with pytest.raises(ValidationError):
        PPOSettings(episodes=1, minibatches=1)
