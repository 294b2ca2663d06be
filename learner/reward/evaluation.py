"""How well heads predict votes that they were not fitted on: cross-validation, a test for a signal, held-out votes."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.reward import likelihood
from learner.reward.likelihood import A, B
from learner.reward.linear_heads import Heads, VoteTensors, fit
from server.store.learning.round_metrics import HeldOut, SignalTest

# The difference in log length up to which two answers count as equally long.
LIKE_LENGTH = math.log1p(0.25)


@dataclass(frozen=True)
class CrossValidation:
    """Held-out negative log-likelihood and accuracy of K heads."""

    nll: Tensor  # (K,) mean over votes
    accuracy: Tensor  # (K,) mean over votes that name a winner, thumbs included


def cross_validate(
    features: Tensor,
    votes: VoteTensors,
    l2: Tensor,
    label_smoothing: float,
    fold: Tensor,
    outcome: Tensor | None = None,
    thumb: Tensor | None = None,
) -> CrossValidation:
    """Held-out metrics for each entry of `l2` (K,); `outcome` (K, C) and `thumb` (K, M) as in `fit`."""
    folds, k = int(fold.max()) + 1, len(l2)
    outcome = votes.outcome.expand(k, -1) if outcome is None else outcome
    thumb = votes.thumb.expand(k, -1) if thumb is None else thumb
    numbers = torch.arange(folds).repeat_interleave(k)  # Heads are ordered by fold, then by l2.
    held_c = fold[votes.choice_group] == numbers[:, None]
    held_m = fold[votes.thumb_group] == numbers[:, None]
    outcome, thumb = outcome.repeat(folds, 1), thumb.repeat(folds, 1)
    heads = fit(
        features,
        votes,
        l2.repeat(folds),
        label_smoothing,
        choice_weight=(~held_c).to(features.dtype),
        thumb_weight=(~held_m).to(features.dtype),
        outcome=outcome,
        thumb=thumb,
    )

    said = replace(votes, outcome=outcome, thumb=thumb)
    right_c, right_m = correct(heads, features, said)
    right = torch.cat([right_c, right_m], dim=1)
    held = torch.cat([held_c, held_m], dim=1)
    counted = held & ~right.isnan()
    losses = vote_losses(heads, features, said)

    def by_head(x: Tensor, counted: Tensor) -> Tensor:
        total = torch.where(counted, x, 0.0).view(folds, k, -1).sum(dim=(0, 2))
        return total / counted.view(folds, k, -1).sum(dim=(0, 2))

    return CrossValidation(nll=by_head(losses, held), accuracy=by_head(right, counted))


def fold_of(votes: VoteTensors, folds: int, generator: torch.Generator) -> Tensor:
    """(groups,) the fold of every conversation; folds have equal size."""
    return torch.randperm(votes.groups, generator=generator) % folds


def correct(heads: Heads, features: Tensor, votes: VoteTensors) -> tuple[Tensor, Tensor]:
    """Whether each head agrees with each vote, (K, C) and (K, M), in {0, 0.5, 1}; NaN for ties and both-bad, which
    name no winner."""
    scores = heads.scores(features)
    return agreement(scores[:, votes.a] - scores[:, votes.b], votes.outcome), (
        (scores[:, votes.response] - heads.bars(votes)) * votes.thumb > 0
    ).to(features.dtype)


def agreement(delta: Tensor, outcome: Tensor) -> Tensor:
    """1 where the sign of delta (..., C) names the chosen answer, 0.5 at zero, 0 otherwise, NaN without a winner."""
    sign = torch.where(outcome == A, 1.0, torch.where(outcome == B, -1.0, torch.nan))
    return (torch.sign(delta) * sign + 1) / 2


def vote_losses(heads: Heads, features: Tensor, votes: VoteTensors) -> Tensor:
    """(K, C + M) unweighted, unsmoothed negative log-likelihood of each vote."""
    scores = heads.scores(features)
    outcome = votes.outcome.expand(len(scores), -1)
    choices = likelihood.choice_loss(heads.choice_log_probs(scores, votes), outcome)
    thumbs = likelihood.thumb_loss(scores[:, votes.response], heads.bars(votes), votes.thumb)
    return torch.cat([choices, thumbs], dim=1)


def signal_test(
    features: Tensor,
    votes: VoteTensors,
    l2: float,
    label_smoothing: float,
    folds: int,
    repeats: int,
    permutations: int,
    generator: torch.Generator,
) -> SignalTest:
    """Permutation test of the cross-validated accuracy, averaged over `repeats` ways to make folds.

    Each permutation shuffles the outcomes among the comparisons, and each user's thumbs among themselves. The penalty
    is given, not chosen from these votes, so the test needs no correction for a choice."""
    n = permutations + 1
    outcomes, thumbs = [votes.outcome], [votes.thumb]
    for _ in range(permutations):
        outcomes.append(votes.outcome[_shuffle(torch.zeros_like(votes.outcome), generator)])
        thumbs.append(votes.thumb[_shuffle(votes.user, generator)])
    penalties = torch.full((n,), l2)
    accuracy = torch.zeros(n)
    for _ in range(repeats):
        fold = fold_of(votes, folds, generator)
        result = cross_validate(
            features, votes, penalties, label_smoothing, fold, torch.stack(outcomes), torch.stack(thumbs)
        )
        accuracy += result.accuracy / repeats
    if accuracy[0].isnan():
        # Only ties and both-bad: no vote names a winner.
        return SignalTest(math.nan, math.nan, 1.0)
    # The real votes count as one of the permutations, so p is never 0 (Phipson & Smyth 2010).
    at_least = int((accuracy[1:] >= accuracy[0] - 1e-6).sum())
    return SignalTest(float(accuracy[0]), float(accuracy[1:].mean()), (at_least + 1) / n)


def _shuffle(within: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation of the indices of `within` that moves each only among indices of equal value."""
    order = torch.randperm(len(within), generator=generator)
    # Sorting a shuffle by group gives, group by group, the same slots as sorting the identity does.
    result = torch.empty_like(order)
    result[torch.argsort(within, stable=True)] = order[torch.argsort(within[order], stable=True)]
    return result


def held_out(heads: Heads, features: Tensor, votes: VoteTensors, log_lengths: Tensor) -> HeldOut:
    """Metrics of a single head (K = 1) on choices that name a winner; `log_lengths` (N,). NaN if there are none."""
    decisive = (votes.outcome == A) | (votes.outcome == B)
    outcome = votes.outcome[decisive]
    scores = heads.scores(features)[0]
    delta = (scores[votes.a] - scores[votes.b])[decisive]
    longer = (log_lengths[votes.a] - log_lengths[votes.b])[decisive].to(features.dtype)
    right = agreement(delta, outcome)
    alike = longer.abs() <= LIKE_LENGTH
    return HeldOut(
        votes=int(decisive.sum()),
        accuracy=float(right.mean()),
        nll=float(likelihood.preference_loss(torch.where(outcome == A, delta, -delta)).mean()),
        ece=expected_calibration_error(torch.sigmoid(delta.abs()), right),
        longer_wins=float(agreement(longer, outcome).mean()),
        hotter_wins=float(agreement(votes.temperature_difference[decisive], outcome).mean()),
        matched_votes=int(alike.sum()),
        matched_accuracy=float(right[alike].mean()),
        length_correlation=float(torch.corrcoef(torch.stack([delta, longer]))[0, 1]) if len(delta) > 1 else math.nan,
    )


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """Mean over predictions of their bin's |confidence - accuracy|, equal widths on [0.5, 1] (Guo et al. 2017)."""
    if not len(confidence):
        return float("nan")
    index = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=confidence.dtype).scatter_add_(0, index, confidence - correct.to(confidence.dtype))
    return float(gap.abs().sum() / len(confidence))
