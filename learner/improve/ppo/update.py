"""One update of the policy on one rollout batch, and the data it needs.

The value head works on frozen features and has its own optimiser group. An update stops once the policy has moved too
far. Shapes: B responses, T response tokens, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.improve.ppo.adam import Adam
from learner.improve.ppo.losses import policy_loss, truncated_importance_weights, value_loss
from learner.improve_settings import PPOSettings
from learner.model.forward import Tokens, micro_batches
from learner.model.kl import kl_k3, masked_mean


class Critic(nn.Module):
    """Value of the tokens so far: a linear head on the frozen features of the prefix, (..., F) -> (...)."""

    def __init__(self, weights: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())
        self.bias = nn.Parameter(torch.tensor(bias, dtype=weights.dtype, device=weights.device))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weights + self.bias


@dataclass(frozen=True)
class Experience:
    """A rollout with everything an update needs; (B, T) except for `tokens` and `prefix_features` (B, T, F)."""

    tokens: Tokens
    old_logprobs: Tensor
    behavior_logprobs: Tensor
    prefix_features: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class UpdateStats:
    """Means over the minibatches of one update."""

    policy_loss: float
    value_loss: float
    approx_kl: float
    clipfrac: float
    grad_norm: float
    first_ratio_error: float
    optimizer_steps: int


def draw_minibatches(tokens: Tokens, settings: PPOSettings, generator: torch.Generator) -> list[list[Tensor]]:
    """For each pass, the rows of each minibatch, ascending."""
    passes = []
    for _ in range(settings.epochs):
        order = torch.randperm(len(tokens), generator=generator, device=generator.device).to(tokens.input_ids.device)
        passes.append([rows.sort().values for rows in order.tensor_split(settings.minibatches)])
    return passes


def ppo_update(
    logprobs_of: Callable[[Tokens], Tensor],
    critic: Critic,
    optimizer: Adam,
    batch: Experience,
    settings: PPOSettings,
    passes: list[list[Tensor]],
    budget: int,
    sharing: bool,
) -> UpdateStats:
    """Makes a step for each minibatch of `passes`, until they are done or approx_kl exceeds its bound. `logprobs_of` is
    pi_theta; `budget` and `sharing` are those of `micro_batches`.

    `first_ratio_error`, the mean |log ratio| of the first minibatch, must be about 0: no step has been made yet.
    """
    importance = truncated_importance_weights(batch.old_logprobs, batch.behavior_logprobs, settings.importance_cap)
    steps: list[tuple[float, float, float, float, float]] = []
    first_ratio_error = 0.0
    for minibatch in (rows for minibatches in passes for rows in minibatches):
        parts = micro_batches(batch.tokens, budget, [minibatch], sharing=sharing)
        new_logprobs, losses = _backward(logprobs_of, critic, optimizer, batch, importance, settings, parts)
        new_logprobs = new_logprobs[minibatch]
        mask, old_logprobs = batch.tokens.response_mask[minibatch], batch.old_logprobs[minibatch]
        log_ratio = new_logprobs - old_logprobs
        approx_kl = float(masked_mean(kl_k3(old_logprobs, new_logprobs), mask))
        if not steps:
            first_ratio_error = float(masked_mean(log_ratio.abs(), mask))
        elif approx_kl > settings.approx_kl_stop:
            optimizer.clear()
            break
        clipfrac = float(masked_mean(((log_ratio.exp() - 1).abs() > settings.clip_range).float(), mask))
        norm = optimizer.step(settings.max_grad_norm)
        steps.append((float(losses[0]), float(losses[1]), approx_kl, clipfrac, norm))
    policy, value, approx_kl, clipfrac, norm = (sum(column) / len(steps) for column in zip(*steps, strict=True))
    return UpdateStats(policy, value, approx_kl, clipfrac, norm, first_ratio_error, len(steps))


def _backward(
    logprobs_of: Callable[[Tokens], Tensor],
    critic: Critic,
    optimizer: Adam,
    batch: Experience,
    importance: Tensor,
    settings: PPOSettings,
    parts: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Adds up the gradients of a minibatch, one micro-batch of `parts` at a time. Returns the new log-probabilities (B,
    T), zero for other rows, and the policy and value losses (2,)."""
    token_count = batch.tokens.response_mask[torch.cat(parts)].sum()
    losses = torch.zeros(2, device=batch.old_logprobs.device)
    new_logprobs = torch.zeros_like(batch.old_logprobs)
    for rows in parts:
        tokens = batch.tokens[rows]
        cut = slice(None), slice(tokens.response_mask.shape[1])
        logprobs = logprobs_of(tokens)
        loss_p = policy_loss(
            logprobs,
            batch.old_logprobs[rows][cut],
            batch.advantages[rows][cut],
            tokens.response_mask,
            token_count,
            settings.clip_range,
            settings.dual_clip,
            importance[rows][cut],
        )
        loss_v = value_loss(
            critic(batch.prefix_features[rows][cut]),
            batch.values[rows][cut],
            batch.returns[rows][cut],
            tokens.response_mask,
            token_count,
            settings.value_clip,
        )
        (loss_p + settings.vf_coef * loss_v).backward()
        optimizer.gather()
        new_logprobs[rows, : logprobs.shape[1]] = logprobs.detach()
        losses += torch.stack([loss_p.detach(), loss_v.detach()])
    return new_logprobs, losses
