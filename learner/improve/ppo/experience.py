"""From a rollout to the data of an update: the critic's features, rewards and advantages."""

from functools import partial

import torch
from torch import Tensor

from learner.improve.ppo.advantages import gae, shape_rewards, whiten
from learner.improve.ppo.update import Critic, Experience
from learner.improve_settings import PPOSettings
from learner.model.features import pool_prefixes
from learner.model.passes import ReferencePass, reference_pass
from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout
from learner.reward.base import RewardModel

# Weight, in tokens, of what the prompt lets expect: a mean over few tokens says little.
PREFIX_PRIOR = 8.0
# About the log of a long answer's number of tokens; scales the position feature to the size of the others.
LONG = 5.0


def judge_rollout(
    policy: TrainablePolicy,
    reward_model: RewardModel,
    rollout: Rollout,
    temperature: float,
    budget: int,
    groups: list[Tensor] | None = None,
) -> ReferencePass:
    """The reference's pass over a rollout, with the critic's features of every prefix."""
    prefix = partial(critic_features, reward_model=reward_model)
    return reference_pass(policy, rollout.tokens, reward_model.spec, temperature, budget, groups, prefix)


def critic_features(states: Tensor, prompt_states: Tensor, reward_model: RewardModel) -> Tensor:
    """Standardised features (B, T, F) of the tokens before each position, from response states (B, T, F - 1). While the
    tokens are few, they are shrunk towards what the prompt, `prompt_states` (B, F - 1), lets expect. A prefix's length
    does not predict the answer's, so the last feature is the position instead, from zero."""
    prefix, counts = pool_prefixes(states)
    mean, scale = reward_model.standardiser.mean.to(states), reward_model.standardiser.scale.to(states)
    expected, seen = reward_model.prompt_features(prompt_states), (counts / (counts + PREFIX_PRIOR))[None, :, None]
    standard = (prefix - mean[:-1]) * scale[:-1] * seen + expected[:, None] * (1 - seen)
    # A function of the position alone: the other rows of a micro-batch must not affect a row's values.
    position = (counts.log1p() / LONG).expand(len(states), -1).unsqueeze(-1)
    return torch.cat([standard, position], dim=2)


def make_critic(reward_model: RewardModel) -> Critic:
    """The reward head on the prefix's features, with weight zero on the position."""
    weights, bias = reward_model.linear_head()
    weights = weights.clone()
    weights[-1] = 0.0
    return Critic(weights, bias)


@torch.no_grad()
def to_experience(
    rollout: Rollout,
    judged: ReferencePass,
    old_logprobs: Tensor,
    scores: Tensor,
    critic: Critic,
    kl_coef: float,
    ppo: PPOSettings,
) -> Experience:
    """The experience of an update. `scores` (B,), one per response, are already within the range that votes covered."""
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
