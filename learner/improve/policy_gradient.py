"""What ways to improve by policy gradients share: the clipped loss, and an update on one rollout batch. Pure torch.

Departures from Schulman et al. 2017: dual clip (Ye et al. 2020), and truncated importance weights for the gap between
the engine that sampled (mu) and the trainer (pi_old). The entropy bonus is left out.

Shapes: B responses, T response tokens. Every loss is a sum over tokens divided by `token_count`, the valid tokens of
the whole minibatch: however it is split into micro-batches, they add up to the same gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.improve.adam import Adam
from learner.improve_settings import PolicyGradientSettings
from learner.model.forward import Tokens, micro_batches
from learner.model.kl import kl_k3, masked_mean, masked_sum

# A loss besides the policy's on some rows of a batch, given these rows, the columns that they need and `token_count`.
OtherLoss = Callable[[Tensor, int, Tensor], Tensor]


@dataclass(frozen=True)
class Experience:
    """A rollout with everything an update of the policy needs; (B, T) except for `tokens`."""

    tokens: Tokens
    old_logprobs: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class UpdateStats:
    """Means over the minibatches of one update."""

    policy_loss: float
    other_loss: float
    approx_kl: float
    clipfrac: float
    grad_norm: float
    first_ratio_error: float
    optimizer_steps: int


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


def truncated_importance_weights(old_logprobs: Tensor, behavior_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / mu, cap), (B, T), no gradient (Espeholt et al. 2018's rho-bar; Yao et al. 2025 for engines)."""
    return (old_logprobs - behavior_logprobs).exp().clamp(max=cap).detach()


def draw_minibatches(tokens: Tokens, epochs: int, minibatches: int, generator: torch.Generator) -> list[list[Tensor]]:
    """For each pass, the rows of each minibatch, ascending."""
    passes = []
    for _ in range(epochs):
        order = torch.randperm(len(tokens), generator=generator, device=generator.device).to(tokens.input_ids.device)
        passes.append([rows.sort().values for rows in order.tensor_split(minibatches)])
    return passes


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, n: int) -> float:
    """The next kl_coef after `n` responses of mean sequence KL `kl`: a proportional controller in log space, its error
    clipped to +-0.2 (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)


def update_policy(
    logprobs_of: Callable[[Tokens], Tensor],
    optimizer: Adam,
    batch: Experience,
    settings: PolicyGradientSettings,
    passes: list[list[Tensor]],
    budget: int,
    sharing: bool,
    other_loss: OtherLoss | None = None,
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
        new_logprobs, losses = _backward(logprobs_of, optimizer, batch, importance, settings, parts, other_loss)
        new_logprobs = new_logprobs[minibatch]
        mask, old_logprobs = batch.tokens.response_mask[minibatch], batch.old_logprobs[minibatch]
        log_ratio = new_logprobs - old_logprobs
        approx_kl = optimizer.workers.leaders(float(masked_mean(kl_k3(old_logprobs, new_logprobs), mask)))
        if not steps:
            first_ratio_error = float(masked_mean(log_ratio.abs(), mask))
        elif approx_kl > settings.approx_kl_stop:
            optimizer.clear()
            break
        clipfrac = float(masked_mean(((log_ratio.exp() - 1).abs() > settings.clip_range).float(), mask))
        norm = optimizer.step(settings.max_grad_norm)
        steps.append((float(losses[0]), float(losses[1]), approx_kl, clipfrac, norm))
    policy, other, approx_kl, clipfrac, norm = (sum(column) / len(steps) for column in zip(*steps, strict=True))
    return UpdateStats(policy, other, approx_kl, clipfrac, norm, first_ratio_error, len(steps))


def _backward(
    logprobs_of: Callable[[Tokens], Tensor],
    optimizer: Adam,
    batch: Experience,
    importance: Tensor,
    settings: PolicyGradientSettings,
    parts: list[Tensor],
    other_loss: OtherLoss | None,
) -> tuple[Tensor, Tensor]:
    """Adds up the gradients of a minibatch, one micro-batch of `parts` at a time, each by one of the workers. Returns
    the new log-probabilities (B, T), zero for other rows, and the policy's and the other loss (2,)."""
    token_count = batch.tokens.response_mask[torch.cat(parts)].sum()
    losses = torch.zeros(2, device=batch.old_logprobs.device)
    new_logprobs = torch.zeros_like(batch.old_logprobs)
    for rows, counts in optimizer.workers.turns(parts):
        tokens = batch.tokens[rows]
        columns = tokens.response_mask.shape[1]
        cut = slice(None), slice(columns)
        logprobs = logprobs_of(tokens)
        loss = policy_loss(
            logprobs,
            batch.old_logprobs[rows][cut],
            batch.advantages[rows][cut],
            tokens.response_mask,
            token_count,
            settings.clip_range,
            settings.dual_clip,
            importance[rows][cut],
        )
        other = other_loss(rows, columns, token_count) if other_loss else torch.zeros_like(loss)
        ((loss + other) * counts).backward()
        optimizer.gather()
        if counts:
            new_logprobs[rows, :columns] = logprobs.detach()
            losses += torch.stack([loss.detach(), other.detach()])
    optimizer.workers.add(new_logprobs, losses)
    return new_logprobs, losses
