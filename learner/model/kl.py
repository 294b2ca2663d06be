"""KL estimators from log-probabilities of sampled tokens, and sums over a response's tokens. Pure torch.

Shapes: B responses, T response tokens, padded on the right; a mask (B, T) is True where a token counts.
"""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the True positions; values at the others, including NaN, do not count."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions of the whole tensor."""
    return masked_sum(x, mask) / mask.sum()


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased for KL(pi || pi_ref) under pi. As a loss its expected gradient is zero, so it
    belongs in the reward. Estimators k1-k3: Schulman, "Approximating KL divergence" (2020)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """pi_ref / pi - 1 - log(pi_ref / pi): unbiased and never negative. For display: as a loss its gradient is that of
    the other KL, KL(pi_ref || pi)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio
