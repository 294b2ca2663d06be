"""From a rollout to the data of an update: values, rewards and advantages."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.improve.policy_gradient import Experience
from learner.improve.ppo.advantages import gae, shape_rewards, whiten
from learner.improve.ppo.critic import Critic
from learner.improve_settings import PPOSettings
from learner.model.passes import ReferencePass
from learner.model.rollout import Rollout


@dataclass(frozen=True)
class ValuedExperience(Experience):
    """With what the critic needs: `prefix_features` (B, T, F), and (B, T) its values and the returns."""

    prefix_features: Tensor
    values: Tensor
    returns: Tensor


@torch.no_grad()
def to_experience(
    rollout: Rollout,
    judged: ReferencePass,
    old_logprobs: Tensor,
    scores: Tensor,
    critic: Critic,
    kl_coef: float,
    ppo: PPOSettings,
) -> ValuedExperience:
    """The experience of an update. `scores` (B,), one per response, are already within the range that votes covered."""
    mask = rollout.tokens.response_mask
    values = critic(judged.prefix_features)
    rewards = shape_rewards(scores.to(mask.device), old_logprobs, judged.ref_logprobs, mask, kl_coef)
    advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.gae_lambda)
    return ValuedExperience(
        tokens=rollout.tokens,
        old_logprobs=old_logprobs,
        behavior_logprobs=rollout.behavior_logprobs,
        advantages=whiten(advantages, mask),
        prefix_features=judged.prefix_features,
        values=values,
        returns=returns,
    )
