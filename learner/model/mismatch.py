"""How far the engine that samples (mu) is from the trainer (pi_old), and whether a push of weights reached it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.model.kl import kl_k3

# Limits of the root mean square of log pi_old / mu: several times what was measured with the same weights
# (docs/decisions/0026-every-cpu.md).
MISMATCH_LIMITS = {torch.bfloat16: 0.35, torch.float32: 0.005}
# Number of answers for checking a push.
PUSH_ANSWERS = 8


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


def check_push(gap: Mismatch, limit: float | None, dtype: torch.dtype) -> None:
    """Raises RuntimeError if the engine cannot have sampled from the trainer's weights: after a push that failed,
    training would silently use answers of old weights. Without `limit`, it is what rounding in `dtype` can explain."""
    limit = limit or MISMATCH_LIMITS[dtype]
    if gap.rms > limit:
        raise RuntimeError(
            f"The engine does not sample from the weights that were pushed: its log-probabilities differ from the "
            f"trainer's by {gap.rms:.3f} (root mean square), more than {limit}."
        )
