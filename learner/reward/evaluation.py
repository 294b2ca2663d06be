"""How well heads predict votes that they were not fitted on: cross-validation, and held-out votes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.model.features import FeatureSpec
from learner.reward import likelihood
from learner.reward.likelihood import A, B
from learner.reward.linear_heads import Heads, VoteTensors, fit, reduced
from learner.settings import RewardSettings
from server.store.learning.round_metrics import HeldOut

# The difference in log length up to which two answers count as equally long.
LIKE_LENGTH = math.log1p(0.25)


@dataclass(frozen=True)
class CrossValidation:
    """Held-out negative log-likelihood and accuracy of K heads."""

    # (K,) means by weight: over votes, and over votes that name a winner, thumbs included.
    nll: Tensor
    accuracy: Tensor


def cross_validate(
    features: Tensor,
    votes: VoteTensors,
    l2: Tensor,
    label_smoothing: float,
    fold: Tensor,
) -> CrossValidation:
    """Held-out metrics for each entry of `l2` (K,); `fold` (G,) is the fold of each conversation."""
    folds, k = int(fold.max()) + 1, len(l2)
    numbers = torch.arange(folds).repeat_interleave(k)  # Heads are ordered by fold, then by l2.
    held_c = fold[votes.choice_group] == numbers[:, None]
    held_m = fold[votes.thumb_group] == numbers[:, None]
    heads = fit(
        features,
        votes,
        l2.repeat(folds),
        label_smoothing,
        choice_weight=(~held_c).to(features.dtype),
        thumb_weight=(~held_m).to(features.dtype),
    )

    right_c, right_m = correct(heads, features, votes)
    right = torch.cat([right_c, right_m], dim=1)
    held = torch.cat([held_c, held_m], dim=1)
    counted = held & ~right.isnan()
    losses = vote_losses(heads, features, votes)
    weight = torch.cat([votes.choice_weight, votes.thumb_weight])

    def by_head(x: Tensor, counted: Tensor) -> Tensor:
        total = torch.where(counted, x * weight, 0.0).view(folds, k, -1).sum(dim=(0, 2))
        return total / (counted * weight).view(folds, k, -1).sum(dim=(0, 2))

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


def mean_accuracy(
    features: Tensor, votes: VoteTensors, spec: FeatureSpec, settings: RewardSettings, generator: torch.Generator
) -> float:
    """Cross-validated accuracy on answers with features (N, F), averaged over several ways to make folds; NaN if no
    vote names a winner."""
    if not len(votes):
        return math.nan
    features, votes = reduced(features, votes, spec)
    penalty = torch.tensor([settings.signal_l2])
    folds = [
        fold_of(votes, min(settings.signal_folds, votes.groups), generator) for _ in range(settings.signal_repeats)
    ]
    every = [cross_validate(features, votes, penalty, settings.label_smoothing, fold).accuracy for fold in folds]
    return float(torch.stack(every).mean())


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
