"""PPO's losses and one update on one rollout batch.

Departures from Schulman et al. 2017: dual clip (Ye et al. 2020), truncated importance weights for the gap between the
engine that sampled (mu) and the trainer (pi_old), a value head on frozen features with an optimiser group of its own,
and a stop within the update once the policy has moved too far. The entropy bonus is left out.

Shapes: B responses, T response tokens. Every loss is a sum over tokens divided by `token_count`, the valid tokens of
the whole minibatch: micro-batches may be split anyhow and add up to the same gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.improve.ppo.advantages import kl_k3, masked_mean, masked_sum
from learner.model.forward import Tokens, micro_batches
from learner.settings import PPOSettings


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
    token that became far likelier cannot rule the batch."""
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
    """Half the squared error, the worse of the free and the clipped value; all (B, T)."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    losses = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_sum(losses, response_mask) / token_count


def truncated_importance_weights(old_logprobs: Tensor, behavior_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / mu, cap), (B, T), no gradient (Espeholt et al. 2018's rho-bar; Yao et al. 2025 for engines)."""
    return (old_logprobs - behavior_logprobs).exp().clamp(max=cap).detach()


@dataclass(frozen=True)
class Mismatch:
    """How far the trainer's pi_old is from the engine's mu, on tokens mu drew."""

    rms: float
    kl: float
    effective_share: float
    outside: float


def mismatch(old_logprobs: Tensor, behavior_logprobs: Tensor, response_mask: Tensor) -> Mismatch:
    """Root mean square of the log-ratio, KL(mu || pi_old) by k3, effective sample size as a share of the tokens, and
    the share of tokens whose ratio is outside [0.9, 1.1]; all (B, T)."""
    log_ratio = (old_logprobs - behavior_logprobs)[response_mask]
    ratio = log_ratio.exp()
    return Mismatch(
        rms=float(log_ratio.square().mean().sqrt()),
        kl=float(kl_k3(behavior_logprobs, old_logprobs)[response_mask].mean()),
        effective_share=float(ratio.sum().square() / (len(ratio) * ratio.square().sum())),
        outside=float(((ratio < 0.9) | (ratio > 1.1)).float().mean()),
    )


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
    """A rollout with everything an update needs; (B, T) but for `tokens` and `prefix_features` (B, T, F)."""

    tokens: Tokens
    old_logprobs: Tensor
    behavior_logprobs: Tensor
    prefix_features: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class Adam:
    """torch's Adam over parameter groups, each parameter below float32 through a float32 master copy: a bfloat16
    weight would round most steps away."""

    def __init__(self, groups: list[tuple[list[nn.Parameter], float]], epsilon: float) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        masters = []
        for parameters, learning_rate in groups:
            copies = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone()) for p in parameters]
            self._pairs += list(zip(parameters, copies, strict=True))
            masters.append({"params": copies, "lr": learning_rate})
        self._adam = torch.optim.Adam(masters, eps=epsilon)

    def gather(self) -> None:
        """Adds the gradients of one micro-batch to the masters': their sum is kept in float32, too."""
        for parameter, master in self._pairs:
            if master is not parameter and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def step(self, max_grad_norm: float) -> float:
        """Clips by the global norm, steps, clears the gradients; returns the norm before the clip."""
        self.gather()
        norm = nn.utils.clip_grad_norm_([master for _, master in self._pairs], max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError("The gradient is not finite; the update was not made.")
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            for parameter, master in self._pairs:
                if master is not parameter:
                    parameter.copy_(master)
        return float(norm)

    def clear(self) -> None:
        """Drops gradients that were not stepped."""
        for parameter, master in self._pairs:
            parameter.grad = master.grad = None

    def state(self) -> dict[str, Tensor]:
        """Master weights and moments by name, to be saved."""
        state = {f"{number}.weight": master.detach() for number, (_, master) in enumerate(self._pairs)}
        for number, (_, master) in enumerate(self._pairs):
            state.update({f"{number}.{name}": moment for name, moment in self._adam.state[master].items()})
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave back; the parameters follow their masters. Raises KeyError for another model's."""
        for number, (parameter, master) in enumerate(self._pairs):
            master.copy_(state[f"{number}.weight"])
            parameter.copy_(master)
            names = [name for name in state if name.startswith(f"{number}.") and not name.endswith(".weight")]
            self._adam.state[master] = {name.partition(".")[2]: state[name] for name in names}


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
    """The rows of each minibatch of each pass, ascending."""
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
) -> UpdateStats:
    """A step for each minibatch of `passes`, until they are done or approx_kl exceeds its bound; `logprobs_of` is
    pi_theta.

    `first_ratio_error`, the mean |log ratio| of the first minibatch, must be about 0: nothing has been stepped yet.
    """
    importance = truncated_importance_weights(batch.old_logprobs, batch.behavior_logprobs, settings.importance_cap)
    sums: list[tuple[float, float, float, float, float]] = []
    first_ratio_error = 0.0
    device = batch.old_logprobs.device
    for minibatches in passes:
        for minibatch in minibatches:
            mask = batch.tokens.response_mask[minibatch]
            token_count = mask.sum()
            losses = torch.zeros(2, device=device)
            new_logprobs = torch.zeros_like(batch.old_logprobs)
            for rows in micro_batches(batch.tokens, settings.micro_batch_tokens, [minibatch]):
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
            log_ratio = (new_logprobs - batch.old_logprobs)[minibatch]
            approx_kl = float(masked_mean(kl_k3(batch.old_logprobs[minibatch], new_logprobs[minibatch]), mask))
            if not sums:
                first_ratio_error = float(masked_mean(log_ratio.abs(), mask))
            elif approx_kl > settings.approx_kl_stop:
                optimizer.clear()
                return _stats(sums, first_ratio_error)
            clipfrac = float(masked_mean(((log_ratio.exp() - 1).abs() > settings.clip_range).float(), mask))
            norm = optimizer.step(settings.max_grad_norm)
            sums.append((float(losses[0]), float(losses[1]), approx_kl, clipfrac, norm))
    return _stats(sums, first_ratio_error)


def _stats(sums: list[tuple[float, float, float, float, float]], first_ratio_error: float) -> UpdateStats:
    policy, value, approx_kl, clipfrac, norm = (sum(column) / len(sums) for column in zip(*sums, strict=True))
    return UpdateStats(policy, value, approx_kl, clipfrac, norm, first_ratio_error, len(sums))
