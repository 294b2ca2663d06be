"""PPO's losses. Pure torch.

Departures from Schulman et al. 2017: dual clip (Ye et al. 2020), and truncated importance weights for the gap between
the engine that sampled (mu) and the trainer (pi_old). The entropy bonus is left out.

Shapes: B responses, T response tokens. Every loss is a sum over tokens divided by `token_count`, the valid tokens of
the whole minibatch: however it is split into micro-batches, they add up to the same gradient.
"""

import torch
from torch import Tensor

from learner.model.kl import masked_sum


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    token_count: int | Tensor,
    clip_range: float,
    dual_clip: float,
    importance_weights: Tensor | None = None,
) -> Tensor:
    """Clipped surrogate, to be minimised; all (B, T). For negative advantages it is bounded by dual_clip * |A|, so one
    token that became far more likely cannot dominate the batch."""
    # Replaced before the exponential, so that a NaN or an infinity at a masked position has no gradient either.
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    advantages = torch.where(response_mask, advantages, 0.0)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if importance_weights is not None:
        losses = losses * importance_weights.detach()
    return masked_sum(losses, response_mask) / token_count


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


def truncated_importance_weights(old_logprobs: Tensor, behavior_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / mu, cap), (B, T), no gradient (Espeholt et al. 2018's rho-bar; Yao et al. 2025 for engines)."""
    return (old_logprobs - behavior_logprobs).exp().clamp(max=cap).detach()
