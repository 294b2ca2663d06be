"""From a rollout to what an update needs: the reference's and the trainer's own pass over it, rewards, advantages.

The reference's pass gives the log-probabilities for the KL and, from the same hidden states, the features that the
reward model scores and the critic values: neither needs a pass of its own.

A pass computes where its tokens are, and what it gives for each token stays there. What stands for a whole response,
its features and its score, is on the CPU, where the reward model is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.improve.ppo.advantages import gae, shape_rewards, whiten
from learner.improve.ppo.losses import Critic, Experience
from learner.model.features import pool, pool_prefixes
from learner.model.forward import Tokens, micro_batches, response_states, run_trunk, token_logprobs
from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout
from learner.reward.reward_model import LinearRewardModel
from learner.settings import PPOSettings

# Tokens of prior belief that a prefix is average: a mean over few tokens says little.
PREFIX_PRIOR = 8.0
# Log of a long answer's tokens, about; brings the position's feature to the size of the others.
LONG = 5.0


@dataclass(frozen=True)
class Judged:
    """A rollout seen by the reference: ref_logprobs (B, T), pooled features (B, F) on the CPU, prefix features
    (B, T, F)."""

    ref_logprobs: Tensor
    features: Tensor
    prefix_features: Tensor


@torch.no_grad()
def judge_rollout(
    policy: TrainablePolicy,
    reward_model: LinearRewardModel,
    rollout: Rollout,
    temperature: float,
    budget: int,
    groups: list[Tensor] | None = None,
    *,
    prefixes: bool = True,
) -> Judged:
    """The reference's pass over a rollout, cut as `micro_batches` says; without `prefixes`, which a critic needs, their
    features are (B, T, 0)."""
    tokens, width = rollout.tokens, len(reward_model.weights)
    shape, device = tokens.response_mask.shape, tokens.response_mask.device
    ref_logprobs = torch.zeros(shape, device=device)
    features = torch.zeros(len(tokens), width, device=device)
    prefix_features = torch.zeros(*shape, width if prefixes else 0, device=device)
    with policy.reference() as reference:
        for rows in micro_batches(tokens, budget, groups):
            part = tokens[rows]
            hidden, layer_states = run_trunk(reference, part, reward_model.layers)
            columns = part.response_mask.shape[1]
            ref_logprobs[rows, :columns] = token_logprobs(reference, hidden, part, temperature)
            states = response_states(layer_states, part)
            features[rows] = pool(states, part.response_mask)
            if prefixes:
                prefix_features[rows, :columns] = critic_features(states, reward_model)
    return Judged(ref_logprobs, features.cpu(), prefix_features)


def critic_features(states: Tensor, reward_model: LinearRewardModel) -> Tensor:
    """(B, T, F) standardised features of the tokens before each position, shrunk to the average (zero) while they are
    few. Their length is no prediction of the answer's, so that feature starts from the mean, too."""
    prefix, counts = pool_prefixes(states)
    mean, scale = reward_model.standardiser.mean.to(states), reward_model.standardiser.scale.to(states)
    standard = (prefix - mean[:-1]) * scale[:-1] * (counts / (counts + PREFIX_PRIOR))[None, :, None]
    # A function of the position alone: a row's company in a micro-batch must not show in its values.
    position = (counts.log1p() / LONG).expand(len(states), -1).unsqueeze(-1)
    return torch.cat([standard, position], dim=2)


def make_critic(reward_model: LinearRewardModel) -> Critic:
    """The reward head on the prefix's features; it knows nothing of position yet."""
    weights = reward_model.weights.clone()
    weights[-1] = 0.0
    return Critic(weights, reward_model.bias)


@torch.no_grad()
def policy_logprobs(
    policy: TrainablePolicy, tokens: Tokens, temperature: float, budget: int, groups: list[Tensor] | None = None
) -> Tensor:
    """(B, T) log-probabilities of the sampled tokens under the policy as it is, cut as `micro_batches` says; zero where
    no group has the row."""
    logprobs = torch.zeros(tokens.response_mask.shape, device=tokens.response_mask.device)
    for rows in micro_batches(tokens, budget, groups):
        part = tokens[rows]
        hidden, _ = run_trunk(policy.model, part)
        logprobs[rows, : part.response_mask.shape[1]] = token_logprobs(policy.model, hidden, part, temperature)
    return logprobs


@torch.no_grad()
def to_experience(
    rollout: Rollout,
    judged: Judged,
    old_logprobs: Tensor,
    scores: Tensor,
    critic: Critic,
    kl_coef: float,
    ppo: PPOSettings,
) -> Experience:
    """`scores` (B,), one per response, already within the range that votes covered."""
    mask = rollout.tokens.response_mask
    values = critic(judged.prefix_features)
    rewards = shape_rewards(scores.to(mask.device), old_logprobs, judged.ref_logprobs, mask, kl_coef)
    advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.gae_lambda)
    return Experience(
        rollout.tokens,
        old_logprobs,
        rollout.behavior_logprobs,
        judged.prefix_features,
        values,
        whiten(advantages, mask),
        returns,
    )
