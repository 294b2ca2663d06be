"""Linear heads on frozen features: fit many at once, cross-validate, test for a signal, bootstrap. Pure torch.

A head is fitted by penalised maximum likelihood (`learner.reward.likelihood`). It lives in the span of the answers it
was fitted on, so fits run in that span's coordinates (`span_basis`): a few hundred numbers instead of thousands, and
exactly the same optimum. Folds, penalties, permutations and bootstraps are independent rows of one problem, and L-BFGS
on their sum costs little more than on one.

The temperature difference of the two answers is a nuisance covariate: the fit may explain votes by it, scores leave it
out.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.reward import likelihood
from learner.reward.likelihood import A, B

# The difference in log length up to which two answers count as equally long.
LIKE_LENGTH = math.log1p(0.25)


@dataclass(frozen=True)
class VoteTensors:
    """Votes as indices into N responses: C choices and M thumbs."""

    # Choices, all (C,): rows of the two responses, outcome (A, B, TIE, BOTH_BAD), temperature of a minus that of b.
    a: Tensor
    b: Tensor
    outcome: Tensor
    temperature_difference: Tensor
    choice_weight: Tensor
    # Conversations as integers: what cross-validation and bootstrap hold together.
    choice_group: Tensor
    # Thumbs, all (M,): row of the response, +1.0 or -1.0, user as an integer.
    response: Tensor
    thumb: Tensor
    user: Tensor
    thumb_weight: Tensor
    thumb_group: Tensor
    users: int

    def __len__(self) -> int:
        return len(self.a) + len(self.thumb)

    def voted(self, features: Tensor) -> tuple[Tensor, "VoteTensors"]:
        """(D, F) features, out of (N, F), of the responses that were voted on, each once, and these votes as indices
        into them. A fit scores every response that it is given; the others would cost as much as these."""
        rows = torch.cat([self.a, self.b, self.response]).unique()
        a, b, response = (torch.searchsorted(rows, index) for index in (self.a, self.b, self.response))
        return features[rows], replace(self, a=a, b=b, response=response)

    @property
    def groups(self) -> int:
        """One more than the highest conversation number."""
        return int(torch.cat([self.choice_group, self.thumb_group]).max()) + 1 if len(self) else 0


@dataclass(frozen=True)
class Heads:
    """K heads over F features, and what else the likelihood needs: first axis K everywhere."""

    weights: Tensor  # (K, F)
    temperature: Tensor  # (K,) effect of one unit of temperature difference on a choice
    log_eta: Tensor  # (K,) width of a tie
    bad_bar: Tensor  # (K,)
    thumb_bar: Tensor  # (K,)
    user_bars: Tensor  # (K, U) offsets from thumb_bar

    def eta(self) -> Tensor:
        """(K,) bounded, so that a line search that tries a far step gets a number back."""
        return self.log_eta.clamp(-6.0, 3.0).exp()

    def scores(self, features: Tensor) -> Tensor:
        """(K, N) scores of features (N, F)."""
        return torch.matmul(self.weights, features.mT)


def span_basis(features: Tensor) -> Tensor:
    """(D, F) orthonormal basis of the span of features (N, D), F <= min(N, D). A ridge-penalised linear fit on
    `features @ basis` has the same scores as one on `features`."""
    if features.shape[0] >= features.shape[1]:
        every: Tensor = torch.linalg.eigh(features.mT @ features).eigenvectors
        return every
    values, vectors = torch.linalg.eigh(features @ features.mT)
    kept = values > 1e-6 * values[-1]
    return torch.matmul(features.mT, vectors[:, kept] / values[kept].sqrt())


def objective(
    heads: Heads,
    features: Tensor,
    votes: VoteTensors,
    l2: Tensor,
    label_smoothing: float,
    choice_weight: Tensor,
    thumb_weight: Tensor,
    outcome: Tensor,
    thumb: Tensor,
) -> Tensor:
    """(K,) penalised negative log-likelihoods. Weights, outcomes and thumbs are (K, C) and (K, M), `l2` (K,)."""
    scores = heads.scores(features)
    loss = 0.5 * l2 * heads.weights.square().sum(dim=1)
    if votes.a.numel():
        log_probs = likelihood.choice_log_probs(
            scores[:, votes.a],
            scores[:, votes.b],
            heads.temperature[:, None] * votes.temperature_difference,
            heads.eta()[:, None],
            heads.bad_bar[:, None],
        )
        loss = loss + (choice_weight * likelihood.choice_loss(log_probs, outcome, label_smoothing)).sum(dim=1)
    if votes.thumb.numel():
        bar = heads.thumb_bar[:, None] + heads.user_bars[:, votes.user]
        losses = likelihood.thumb_loss(scores[:, votes.response], bar, thumb, label_smoothing)
        loss = loss + (thumb_weight * losses).sum(dim=1)
    # Weak priors: sd 1 for log eta around a half, for user offsets and the temperature effect; sd 3 for the bars.
    prior = (heads.log_eta + 0.693147).square() + heads.temperature.square() + heads.user_bars.square().sum(dim=1)
    return loss + 0.5 * prior + 0.5 * (heads.bad_bar.square() + heads.thumb_bar.square()) / 9


def fit(
    features: Tensor,
    votes: VoteTensors,
    l2: Tensor,
    label_smoothing: float,
    *,
    choice_weight: Tensor | None = None,
    thumb_weight: Tensor | None = None,
    outcome: Tensor | None = None,
    thumb: Tensor | None = None,
    max_iterations: int = 100,
) -> Heads:
    """K heads at the minimum of `objective`, one per entry of `l2` (K,).

    `features` (N, F). The other arguments, (K, C) or (K, M), give each head its own weights (a fold or a bootstrap is
    a weight) or its own outcomes (a permutation); left out, they are those of `votes`. Weights multiply the
    votes' own."""
    k, dtype = len(l2), features.dtype
    l2 = l2.to(dtype)
    ones_c, ones_m = features.new_ones(k, len(votes.a)), features.new_ones(k, len(votes.thumb))
    choice_weight = (ones_c if choice_weight is None else choice_weight) * votes.choice_weight
    thumb_weight = (ones_m if thumb_weight is None else thumb_weight) * votes.thumb_weight
    outcome = votes.outcome.expand(k, -1) if outcome is None else outcome
    thumb = votes.thumb.expand(k, -1) if thumb is None else thumb
    heads = Heads(
        weights=features.new_zeros(k, features.shape[1]),
        temperature=features.new_zeros(k),
        log_eta=features.new_full((k,), -0.693147),
        bad_bar=features.new_zeros(k),
        thumb_bar=features.new_zeros(k),
        user_bars=features.new_zeros(k, votes.users),
    )
    parameters = [value.requires_grad_() for value in vars(heads).values()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, history_size=20, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # A mean, so that the tolerances do not depend on the number of heads.
        loss = objective(
            heads, features, votes, l2, label_smoothing, choice_weight, thumb_weight, outcome, thumb
        ).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Heads(*(value.detach() for value in parameters))


def correct(heads: Heads, features: Tensor, votes: VoteTensors) -> tuple[Tensor, Tensor]:
    """Whether each head agrees with each vote, (K, C) and (K, M), in {0, 0.5, 1}; NaN for ties and both-bad, which
    name no winner."""
    scores = heads.scores(features)
    return agreement(scores[:, votes.a] - scores[:, votes.b], votes.outcome), (
        (scores[:, votes.response] - heads.thumb_bar[:, None] - heads.user_bars[:, votes.user]) * votes.thumb > 0
    ).to(features.dtype)


def agreement(delta: Tensor, outcome: Tensor) -> Tensor:
    """1 where the sign of delta (..., C) names the chosen answer, 0.5 at zero, 0 otherwise, NaN without a winner."""
    sign = torch.where(outcome == A, 1.0, torch.where(outcome == B, -1.0, torch.nan))
    return (torch.sign(delta) * sign + 1) / 2


def fold_of(votes: VoteTensors, folds: int, generator: torch.Generator) -> Tensor:
    """(groups,) the fold of every conversation, the folds of equal size."""
    return torch.randperm(votes.groups, generator=generator) % folds


@dataclass(frozen=True)
class CrossValidation:
    """Of K heads, by vote: negative log-likelihood and agreement where the vote was held out."""

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
    """Held-out figures for each entry of `l2` (K,); `outcome` (K, C) and `thumb` (K, M) as in `fit`."""
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


def vote_losses(heads: Heads, features: Tensor, votes: VoteTensors) -> Tensor:
    """(K, C + M) unweighted, unsmoothed negative log-likelihood of each vote."""
    scores = heads.scores(features)
    k = len(scores)
    log_probs = likelihood.choice_log_probs(
        scores[:, votes.a],
        scores[:, votes.b],
        heads.temperature[:, None] * votes.temperature_difference,
        heads.eta()[:, None],
        heads.bad_bar[:, None],
    )
    outcome = votes.outcome.expand(k, -1)
    bar = heads.thumb_bar[:, None] + heads.user_bars[:, votes.user]
    thumbs = likelihood.thumb_loss(scores[:, votes.response], bar, votes.thumb)
    return torch.cat([likelihood.choice_loss(log_probs, outcome), thumbs], dim=1)


@dataclass(frozen=True)
class SignalTest:
    """Do the votes say anything that features can predict?"""

    accuracy: float
    null_accuracy: float
    p_value: float


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

    Each permutation shuffles the outcomes among the comparisons and each user's thumbs among that user's. The penalty
    is given, not chosen from these votes, so there is no choice to be paid for."""
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
        # Ties and both-bad alone: no vote names a winner that could be told.
        return SignalTest(math.nan, math.nan, 1.0)
    # The real votes count as one of the permutations, so p is never 0 (Phipson & Smyth 2010).
    at_least = int((accuracy[1:] >= accuracy[0] - 1e-6).sum())
    return SignalTest(float(accuracy[0]), float(accuracy[1:].mean()), (at_least + 1) / n)


def _shuffle(within: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation of the indices of `within` that moves each only among those of equal value."""
    order = torch.randperm(len(within), generator=generator)
    # Sorting a shuffle by group gives, group by group, the same slots as sorting the identity does.
    result = torch.empty_like(order)
    result[torch.argsort(within, stable=True)] = order[torch.argsort(within[order], stable=True)]
    return result


def bootstrap(
    features: Tensor, votes: VoteTensors, l2: float, label_smoothing: float, refits: int, generator: torch.Generator
) -> Heads:
    """Heads refitted on conversations drawn with replacement."""
    drawn = torch.randint(votes.groups, (refits, votes.groups), generator=generator)
    counts = torch.zeros(refits, votes.groups, dtype=features.dtype)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=features.dtype))
    return fit(
        features,
        votes,
        torch.full((refits,), l2),
        label_smoothing,
        choice_weight=counts[:, votes.choice_group],
        thumb_weight=counts[:, votes.thumb_group],
    )


@dataclass(frozen=True)
class HeldOut:
    """How well scores predict votes they were not fitted on, and what simpler rules and confounders make of them."""

    votes: int
    accuracy: float
    nll: float
    ece: float
    # The rules that a reward model has to beat: the longer answer, the one drawn at the higher temperature.
    longer_wins: float
    hotter_wins: float
    # Where length cannot help: the votes on answers of like length.
    matched_votes: int
    matched_accuracy: float
    # Correlation of the scores' difference with that of log length.
    length_correlation: float


def held_out(heads: Heads, features: Tensor, votes: VoteTensors, log_lengths: Tensor) -> HeldOut:
    """Figures of a single head (K = 1) on choices that name a winner; `log_lengths` (N,). NaN without any."""
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
    """Mean of |confidence - accuracy| of a prediction's bin, equal widths on [0.5, 1] (Guo et al. 2017)."""
    if not len(confidence):
        return float("nan")
    index = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=confidence.dtype).scatter_add_(0, index, confidence - correct.to(confidence.dtype))
    return float(gap.abs().sum() / len(confidence))


def vote_weights(ages_days: Tensor, users: Tensor, half_life_days: float, floor: float, user_share: float) -> Tensor:
    """(V,) weight of each vote: halved every `half_life_days`, never below `floor`; then no user (U integers) has more
    than `user_share` of the sum, or twice an equal share where that is more. A few users, whose equal shares are above
    `user_share`, are not capped at all."""
    weights = torch.clamp(0.5 ** (ages_days / half_life_days), min=floor)
    if not len(weights):
        return weights
    totals = torch.zeros(int(users.max()) + 1, dtype=weights.dtype).scatter_add_(0, users, weights)
    return weights * cap_shares(totals, user_share)[users]


def cap_shares(totals: Tensor, user_share: float) -> Tensor:
    """Factors <= 1 after which no user's total exceeds `user_share` of the sum, or two equal shares where that is more:
    the highest cap that satisfies itself. A few users are not capped."""
    voters = int((totals > 0).sum())
    if voters * user_share < 1:
        return torch.ones_like(totals)
    share = max(user_share, 2 / voters)
    low, high = 0.0, float(totals.max())
    for _ in range(60):
        cap = (low + high) / 2
        capped = totals.clamp(max=cap)
        low, high = (cap, high) if cap <= share * float(capped.sum()) else (low, cap)
    return totals.clamp(max=low) / totals.clamp(min=1e-12)
