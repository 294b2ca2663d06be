"""The critic: a linear head on frozen features of the tokens so far, and its loss.

It has its own optimiser group. Shapes: B responses, T response tokens, F features.
"""

import torch
from torch import Tensor, nn

from learner.model.features import pool_prefixes
from learner.model.kl import masked_sum
from learner.reward.base import RewardModel

# Weight, in tokens, of what the prompt lets expect: a mean over few tokens says little.
PREFIX_PRIOR = 8.0
# About the log of a long answer's number of tokens; scales the position feature to the size of the others.
LONG = 5.0


class Critic(nn.Module):
    """Value of the tokens so far: a linear head on the frozen features of the prefix, (..., F) -> (...)."""

    def __init__(self, weights: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())
        self.bias = nn.Parameter(torch.tensor(bias, dtype=weights.dtype, device=weights.device))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weights + self.bias


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


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    token_count: int | Tensor,
    value_clip: float,
) -> Tensor:
    """Half the squared error, the worse of the unclipped and the clipped value; all (B, T)."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    losses = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_sum(losses, response_mask) / token_count
