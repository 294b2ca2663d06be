"""Models with random weights, answers of random tokens, and one update of PPO on them, for `gpu.py`."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import stand_ins  # noqa: F401 (before the learner's modules)
import torch
from ppo import random_head
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from learner.improve.adam import Adam
from learner.improve.policy_gradient import UpdateStats, draw_minibatches
from learner.improve.ppo.critic import critic_features, make_critic
from learner.improve.ppo.experience import to_experience
from learner.improve.ppo.trainer import ppo_update
from learner.model.features import FeatureSpec, default_layers
from learner.model.forward import Tokens, run_trunk, shares_prefix, token_logprobs
from learner.model.passes import ReferencePass, policy_logprobs, reference_pass
from learner.model.policy import TrainablePolicy, lora
from learner.model.rollout import Rollout, SampledAnswer, to_rollout
from learner.reward.linear_reward_model import LinearRewardModel

SHAPES: dict[str, Any] = {
    "tiny": LlamaConfig(
        vocab_size=2048, hidden_size=144, intermediate_size=288, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, initializer_range=1 / 12, tie_word_embeddings=True,
    ),
    "135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, initializer_range=1 / 24,
        tie_word_embeddings=True,
    ),
    "1.5B": Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, initializer_range=0.02,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
# The number of tokens that all prompts share, and of each prompt's own tokens.
SHARED, OWN = 24, 16
RESPONSES, CHECKED = 32, 8
TEMPERATURE, TOKENS_AT_ONCE = 0.85, 2048
# The learner's defaults; a learning rate so small that no update stops early.
SETTINGS = SimpleNamespace(
    epochs=1, minibatches=2, micro_batch_tokens=TOKENS_AT_ONCE, learning_rate=1e-6, critic_learning_rate=1e-3,
    adam_epsilon=1e-5, max_grad_norm=1.0, gamma=1.0, gae_lambda=0.95, clip_range=0.2, dual_clip=3.0, value_clip=0.2,
    vf_coef=0.1, kl_coef=0.1, approx_kl_stop=0.02, importance_cap=2.0,
)  # fmt: skip


def make_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]


def make_engine(config: Any, dtype: torch.dtype, device: torch.device) -> TrainablePolicy:
    """A policy whose adapters already change the model, so that it differs from its reference."""
    model = lora(make_model(config, dtype, device), 16, 32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return TrainablePolicy(model, None)


def head_for(policy: TrainablePolicy) -> Any:
    config = policy.model.config
    return random_head(FeatureSpec(*default_layers(config.num_hidden_layers)), config.hidden_size)


def make_rollout(lengths: list[int], vocabulary: int) -> Rollout:
    """Responses of these lengths; their log-probabilities are noise of 0.1 nats (see `update`)."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    shared = draw(SHARED)
    return to_rollout([
        SampledAnswer(
            shared + draw(OWN + row % 4), draw(length), (0.1 * torch.randn(length, generator=generator)).tolist(), "",
            "length",
        )
        for row, length in enumerate(lengths)
    ])  # fmt: skip


def judge_rollout(
    policy: TrainablePolicy,
    reward_model: LinearRewardModel,
    rollout: Rollout,
    budget: int,
    groups: list[Tensor] | None = None,
) -> ReferencePass:
    """The reference's pass over a rollout, with the critic's features."""
    prefix = partial(critic_features, reward_model=reward_model)
    return reference_pass(policy, rollout.tokens, reward_model.spec, TEMPERATURE, budget, groups, prefix)


def update(policy: TrainablePolicy, rollout: Rollout, settings: Any, seconds: dict[str, float]) -> UpdateStats:
    """One update as in `learner.improve.ppo.trainer`, without sampling; fills in the seconds of each stage.

    There is no engine: the rollout's behavior_logprobs are its simulated distance from the policy."""
    device = rollout.tokens.input_ids.device
    reward_model = head_for(policy)
    critic = make_critic(reward_model).to(device)
    optimizer = Adam(
        [(policy.parameters, settings.learning_rate), (list(critic.parameters()), settings.critic_learning_rate)],
        settings.adam_epsilon,
    )

    def logprobs_of(part: Tokens) -> Tensor:
        hidden, _ = run_trunk(policy.model, part)
        return token_logprobs(policy.model, hidden, part, TEMPERATURE)

    passes = draw_minibatches(rollout.tokens, settings.epochs, settings.minibatches, torch.Generator().manual_seed(0))
    budget = settings.micro_batch_tokens
    with stage("reference", seconds, device):
        judged = judge_rollout(policy, reward_model, rollout, budget, passes[0])
    with stage("policy", seconds, device):
        old_logprobs = policy_logprobs(policy, rollout.tokens, TEMPERATURE, budget, passes[0])
    with stage("experience", seconds, device):
        rollout = replace(rollout, behavior_logprobs=old_logprobs + rollout.behavior_logprobs)
        scores = reward_model.clipped(reward_model.scores(judged.features))
        batch = to_experience(rollout, judged, old_logprobs, scores, critic, settings.kl_coef, settings)
    with stage("training", seconds, device):
        sharing = shares_prefix(policy.model)
        return ppo_update(logprobs_of, critic, optimizer, batch, settings, passes, budget, sharing)


@contextmanager
def stage(name: str, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Times the block until the device has finished its work."""
    wait(device)
    started = time.perf_counter()
    yield
    wait(device)
    seconds[name] = time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def figures(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:.3g}" for name, number in numbers.items())
