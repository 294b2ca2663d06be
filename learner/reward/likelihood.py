"""One likelihood for every kind of vote: pairs, ties, both-bad and thumbs. Pure torch.

A response's score is r; a comparison depends on Delta = r_a - r_b. Pairs are Bradley-Terry (Bradley & Terry 1952). Ties
are Rao & Kupper (1967): neither answer leads by more than eta. Of the undecided rest, both-bad takes the share
q = sigmoid(b_bad - (r_a + r_b) / 2), so that the four outcomes sum to one. A thumb is a comparison with the user's own
bar b_u, so one score serves all. Everything goes through softplus and logsigmoid, which are exact where
log(1 + exp(x)) overflows.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

# The order of the last axis of `choice_log_probs`.
A, B, TIE, BOTH_BAD = range(4)


def preference_loss(delta: Tensor, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(delta) for delta = r_chosen - r_rejected, any shape; the share `label_smoothing` of the votes is
    assumed to say the opposite of what was meant (Chowdhury et al. 2024, eq. 12)."""
    return (1 - label_smoothing) * softplus(-delta) + label_smoothing * softplus(delta)


def rao_kupper_log_probs(delta: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P(a), log P(b), log P(neither) for eta > 0; broadcastable shapes.

    The rest 1 - s(delta - eta) - s(-delta - eta) equals (exp(2 eta) - 1) s(delta - eta) s(-delta - eta), which does not
    cancel to zero in the far tails."""
    log_a, log_b = logsigmoid(delta - eta), logsigmoid(-delta - eta)
    return log_a, log_b, torch.log(torch.expm1(2 * eta)) + log_a + log_b


def choice_log_probs(score_a: Tensor, score_b: Tensor, nuisance: Tensor, eta: Tensor, bad_bar: Tensor) -> Tensor:
    """Log-probabilities (..., 4) of A, B, TIE and BOTH_BAD.

    `nuisance`, the influence on a vote of anything besides quality, is added to the difference, but not to the mean
    score that decides both-bad."""
    log_a, log_b, log_rest = rao_kupper_log_probs(score_a - score_b + nuisance, eta)
    bad = bad_bar - (score_a + score_b) / 2
    return torch.stack([log_a, log_b, log_rest + logsigmoid(-bad), log_rest + logsigmoid(bad)], dim=-1)


def choice_loss(log_probs: Tensor, outcome: Tensor, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """-log P(outcome), (...) from log_probs (..., 4); smoothing mixes A with B and leaves ties and both-bad alone."""
    flipped = torch.where(outcome == A, B, torch.where(outcome == B, A, outcome))
    said = log_probs.gather(-1, outcome.unsqueeze(-1)).squeeze(-1)
    meant = log_probs.gather(-1, flipped.unsqueeze(-1)).squeeze(-1)
    return -(1 - label_smoothing) * said - label_smoothing * meant


def thumb_loss(score: Tensor, bar: Tensor, thumb: Tensor, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(+-(r - b_u)), `thumb` +1 or -1; broadcastable shapes."""
    return preference_loss(thumb * (score - bar), label_smoothing)
