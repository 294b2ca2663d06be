"""Whether votes say anything about answers: a score test by sign flips. Pure torch.

The hypothesis to reject: votes depend on temperatures, on slots and on each user's habit with thumbs, but not on what
the answers are. Each vote has a residual, what it was minus what that hypothesis expects, and a direction, the features
that it speaks for minus what the nuisances explain of them. Under the hypothesis the two are unrelated, so that a
conversation's contribution, the sum of their products, might as well have the other sign. The statistic is the squared
length of the sum of all contributions, in the metric of a ridge regression. Its distribution comes from random signs,
one for each conversation; nothing is fitted again, so that ten thousand flips take a fraction of a second.

Flips keep whatever the votes of one conversation have in common, and need no equal variances (Hemerik, Goeman and
Finos, "Robust testing in generalized linear models by sign flipping score contributions", JRSS B 2020).

A service tests again whenever votes have come in. All tests up to the first that passes share one error: a
conversation's signs depend on its id alone, so that each flip is a whole history of tests, and the flips that would
have passed an earlier test count as passing now. The share of the error that may be spent grows with the votes.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.model.features import FeatureSpec
from learner.reward.likelihood import A, B
from learner.reward.linear_heads import VoteTensors, reduced
from learner.settings import RewardSettings
from server.store.learning.round_metrics import SignalTest

NEWTON_STEPS = 25
# Prior precision of an intercept (sd 3), and of the effects of temperature and of a user with one thumb (sd 1), as in
# the fit. The effect of a user with more is hardly shrunk (sd 10): what is left of a habit would come back with every
# thumb of this user, in conversations whose signs are flipped apart.
INTERCEPT, EFFECT, OWN_EFFECT = 1 / 9, 1.0, 0.01
# The least share of a conversation's residuals that is taken as left over by the nuisances.
LEFT_OVER = 0.05
# Share of the error that the first test may spend.
FIRST_SHARE = 0.5


@dataclass(frozen=True)
class Flips:
    """The statistic of the votes, and those of B flips (B,)."""

    observed: float
    flipped: Tensor

    @property
    def passing(self) -> Tensor:
        """(B,) whether a flip's statistic is at least that of the votes."""
        return self.flipped >= self.observed * (1 - 1e-9)


@dataclass(frozen=True)
class Score:
    """What V votes contribute: `residual` (V,) is what was said minus what the nuisances expect, `full` (V,) the same
    with its full variance, `variance` (V,) that of what was said, `direction` (V, F) the features without what the
    nuisances explain of them."""

    residual: Tensor
    full: Tensor
    variance: Tensor
    direction: Tensor


def signal_test(
    features: Tensor,
    votes: VoteTensors,
    conversations: list[str],
    spec: FeatureSpec,
    settings: RewardSettings,
    error: float,
    earlier: SignalTest | None,
    there_are: int = 0,
) -> SignalTest:
    """Whether votes on answers with features (N, F) say anything about them. `conversations` are ids, (G,); `spec` is
    what features are made of; `earlier` is the last test, if it was not passed; `error` is shared by all tests since
    one was. `there_are` more votes than these, if these are a sample. The accuracy is left open."""
    count = max(there_are, len(votes))
    first = earlier.first_votes if earlier else count
    # Deleted votes give nothing back.
    level = allowance(error, max(count, earlier.votes if earlier else 0), first)
    spent = [number for number in earlier.spent if number < settings.signal_flips] if earlier else []
    if not count:
        return SignalTest(math.nan, 1.0, level, 0, 0, first, None, spent)
    flips = flip(*reduced(features, votes, spec), signs_of(conversations, settings.signal_flips), settings.signal_l2)
    p = p_value(flips, spent)
    more = (None, []) if p <= level else (enough(flips, count, level), spend(flips, spent, level))
    return SignalTest(math.nan, p, level, count, len(conversations), first, *more)


def flip(features: Tensor, votes: VoteTensors, signs: Tensor, l2: float) -> Flips:
    """The statistic of votes on answers with standardised features (N, F), and that of each row of `signs` (B, G)."""
    features, signs = features.double(), signs.double()
    both = _choices(features, votes), _thumbs(features, votes)
    information = l2 * torch.eye(features.shape[1], dtype=features.dtype)
    observed = features.new_zeros(features.shape[1])
    for score in both:
        information += (score.variance[:, None] * score.direction).mT @ score.direction
        observed += score.direction.mT @ score.residual
    metric = torch.linalg.cholesky(information)
    contributions = features.new_zeros(signs.shape[1], features.shape[1])
    for score, group in zip(both, (votes.choice_group, votes.thumb_group), strict=True):
        contributions.index_add_(0, group, score.full[:, None] * score.direction)
    contributions = torch.linalg.solve_triangular(metric, contributions.mT, upper=False)
    statistic = torch.linalg.solve_triangular(metric, observed[:, None], upper=False).square().sum()
    return Flips(float(statistic), (contributions @ signs.mT).square().sum(dim=0))


def signs_of(conversation_ids: list[str], flips: int) -> Tensor:
    """(flips, G) a sign of each conversation in each flip: always the same for an id."""
    columns = []
    for conversation_id in conversation_ids:
        seed = int.from_bytes(hashlib.sha256(conversation_id.encode()).digest()[:8], "big", signed=True)
        generator = torch.Generator().manual_seed(seed)
        columns.append(torch.randint(2, (flips,), generator=generator, dtype=torch.int8))
    return 2 * torch.stack(columns, dim=1) - 1


def allowance(error: float, votes: int, first_votes: int) -> float:
    """The error that all tests up to one on `votes` may spend, if the first was on `first_votes`: half of it at once,
    three quarters when the votes have doubled, and so on."""
    return error * (1 - (1 - FIRST_SHARE) * first_votes / max(votes, first_votes, 1))


def p_value(flips: Flips, spent: list[int]) -> float:
    """The share of flips that pass now, or are among those that would have passed an earlier test. The votes count as
    one of them, so that it is never 0 (Phipson and Smyth 2010)."""
    passing = flips.passing.clone()
    passing[spent] = True
    return (int(passing.sum()) + 1) / (len(passing) + 1)


def spend(flips: Flips, spent: list[int], allowed: float) -> list[int]:
    """The numbers of the flips that would have passed by now, if a share `allowed` of all may."""
    flipped = flips.flipped.clone()
    flipped[spent] = torch.inf
    count = max(int(allowed * (len(flipped) + 1) + 1e-9) - 1, len(spent))
    # Like the votes, a flip passes only with all flips that are as large.
    first_too_small = float(flipped.topk(count + 1).values[-1])
    return (flipped > first_too_small * (1 + 1e-9)).nonzero()[:, 0].tolist()


def enough(flips: Flips, votes: int, allowed: float) -> int | None:
    """How many votes of this strength would probably suffice; None if they show no strength.

    What the statistic has above the mean of its flips grows as fast as the votes. It must exceed their quantile, by one
    standard deviation for a chance of some 85 %."""
    flipped = flips.flipped
    strength = flips.observed - float(flipped.mean())
    needed = float(torch.quantile(flipped, 1 - allowed) - flipped.mean() + flipped.std())
    return round(votes * needed / strength) if strength > 0 else None


def _choices(features: Tensor, votes: VoteTensors) -> Score:
    """The nuisances are a preference for a slot and for a temperature. A tie or both bad is half a win."""
    won = torch.where(votes.outcome == A, 1.0, torch.where(votes.outcome == B, 0.0, 0.5)).to(features.dtype)
    nuisances = torch.stack([torch.ones_like(won), votes.temperature_difference.to(features.dtype)], dim=1)
    direction = features[votes.a] - features[votes.b]
    precision = features.new_tensor([INTERCEPT, EFFECT])
    return _score(won, nuisances, precision, votes.choice_weight, direction, votes.choice_group)


def _thumbs(features: Tensor, votes: VoteTensors) -> Score:
    """The nuisances are the share of thumbs up, and each user's deviation from it: users with one thumb are pooled."""
    up = (votes.thumb > 0).to(features.dtype)
    of_users = torch.nn.functional.one_hot(votes.user, votes.users).to(features.dtype)
    nuisances = torch.cat([torch.ones_like(up)[:, None], of_users], dim=1)
    of_user = torch.where(of_users.sum(dim=0) > 1, OWN_EFFECT, EFFECT).to(features.dtype)
    precision = torch.cat([features.new_tensor([INTERCEPT]), of_user])
    return _score(up, nuisances, precision, votes.thumb_weight, features[votes.response], votes.thumb_group)


def _score(
    said: Tensor, nuisances: Tensor, precision: Tensor, weight: Tensor, direction: Tensor, group: Tensor
) -> Score:
    """The votes' contributions, by a logistic regression of `said` (V,) on `nuisances` (V, Z) with a normal prior."""
    weight, effect = weight.to(said.dtype), said.new_zeros(nuisances.shape[1])
    for _ in range(NEWTON_STEPS):
        expected = torch.sigmoid(nuisances @ effect)
        variance = weight * expected * (1 - expected)
        hessian = (variance[:, None] * nuisances).mT @ nuisances + torch.diag(precision)
        gradient = nuisances.mT @ (weight * (said - expected)) - precision * effect
        effect = effect + torch.linalg.solve(hessian, gradient).clamp(-2, 2)
    residual = weight * (said - expected)
    direction = direction - nuisances @ torch.linalg.solve(hessian, (variance[:, None] * nuisances).mT @ direction)
    return Score(residual, _full_variance(residual, variance, nuisances, hessian, group), variance, direction)


def _full_variance(residual: Tensor, variance: Tensor, nuisances: Tensor, hessian: Tensor, group: Tensor) -> Tensor:
    """Residuals (V,) without what a conversation's votes explain of themselves through the nuisances, which makes them
    smaller (Bell and McCaffrey 2002): with it, flips would vary too little."""
    sd = variance.sqrt().clamp(min=1e-12)
    full = residual.clone()
    for number in group.unique():
        rows = (group == number).nonzero()[:, 0]
        own = sd[rows, None] * nuisances[rows]
        left = torch.eye(len(rows), dtype=sd.dtype) - own @ torch.linalg.solve(hessian, own.mT)
        values, vectors = torch.linalg.eigh(left)
        root = vectors / values.clamp(min=LEFT_OVER).sqrt() @ vectors.mT
        full[rows] = sd[rows] * (root @ (residual[rows] / sd[rows]))
    return full
