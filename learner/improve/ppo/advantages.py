"""From scores to advantages: per-token rewards, GAE, whitening. Pure torch, no gradients.

Shapes: B responses, T response tokens, padded on the right; `response_mask` (B, T) is True where a token counts.
Values at masked positions never matter: they are replaced, not multiplied by zero, so a NaN there does not spread.
"""

import torch
from torch import Tensor

from learner.model.kl import kl_k1, masked_mean


def last_token(response_mask: Tensor) -> Tensor:
    """(B,) index of each row's last True position. Found from the mask, never by a pad id: pad may be EOS."""
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    return torch.where(response_mask, positions, -1).max(dim=1).values


def shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Per-token reward: -kl_coef * (log pi - log pi_ref), plus the score on the last token.

    Shapes: scores (B,), the rest (B, T). Ziegler et al. 2019, eq. 2, with the KL spread over its tokens."""
    rewards = torch.where(response_mask, -kl_coef * kl_k1(logprobs, ref_logprobs), 0.0).detach()
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_token(response_mask)] += scores.to(rewards.dtype)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and their returns A + V, both (B, T); zero where masked.

    Schulman et al. 2016, eq. 16. The response's end is the episode's end: nothing is bootstrapped after the last
    token, whether it is an EOS or the length limit, since the score judges the answer as it stands."""
    rewards, values = torch.where(response_mask, rewards, 0.0), torch.where(response_mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(response_mask[:, t], delta + gamma * gae_lambda * following, 0.0)
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sd over the True positions of the whole rollout batch, zero elsewhere. Never call it on a
    micro-batch: each would get its own mean."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)
