"""How much each voter's votes count in a fit: less for those who vote against the others.

Votes are compared with what everybody else's votes predict. A voter's held-out verdicts are the choices, and pairs of
an up and a down thumb, that a reward model fitted without this voter's votes (folds of voters, not of conversations)
gets right or wrong. Three kinds of voters are distinguished by how often it is right:
- with the others: at a rate q above a half, one for all of them, estimated;
- aside: at a half; their taste differs, or they do not care;
- against the others: at 1 - q. Only these count less, by the probability that they are of this kind.
Shares and q are fitted by EM (Dempster, Laird & Rubin 1977), twice: in the second fit, voters suspected in the first
hardly count. If three kinds then do not explain the verdicts significantly better than the first two, everybody counts
in full: so it is with few voters, with few votes each, and with honest voters. A voter whose taste merely differs is
fitted at a half and keeps full weight.

A voter who names one slot more often than a fair coin would (exact test, corrected for the number of voters) does not
count: the order of the slots is random, so such votes say nothing about the answers. With few voters there is no such
test either: a voter who is dropped by chance must be one of many.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.model.features import FeatureSpec
from learner.reward import linear_heads as fitting
from learner.reward.dataset import Dataset
from learner.reward.exact_tests import either_side, holm
from learner.reward.likelihood import A, B
from learner.reward.linear_heads import VoteTensors
from learner.settings import RewardSettings

# Fewer voters cannot be compared with others, and fewer votes cannot be fitted.
MIN_VOTERS = MIN_VOTES = 10
# 2 log likelihood ratio at the 10 % level: half of a chi-square with one degree, since a share of zero is on the edge
# of the possible shares (Self & Liang 1987). With few votes each the test is conservative: docs/decisions/0019 has its
# rates.
SIGNIFICANT = 1.642
LEVEL = 0.05
EM_STEPS = 200


@dataclass(frozen=True)
class Verdicts:
    """Counts of U voters: held-out verdicts, and those that the others' model gets right; choices that name a winner,
    and those that name A. All (U,), integers."""

    heard: Tensor
    right: Tensor
    sided: Tensor
    named_a: Tensor


@dataclass(frozen=True)
class VoteKinds:
    """The result of `kinds`."""

    # (U,) probability of being against the others; zero for all if that kind is not needed.
    against: Tensor
    # Shares of voters who are with the others, aside and against, and how often the first kind is right.
    shares: Tensor
    rate: float
    # 2 log likelihood ratio of three kinds to two.
    evidence: float


def weigh_voters(
    dataset: Dataset, features: Tensor, spec: FeatureSpec, settings: RewardSettings, generator: torch.Generator
) -> tuple[Dataset, Tensor]:
    """The dataset with every vote's weight multiplied by its voter's factor, and these factors (U,), 1 for most. They
    are computed from training votes alone: judge votes stay out of the fit, but are weighted by it."""
    train, trains, count = dataset.train, ~dataset.judging, len(dataset.users)
    voters, compared = dataset.voters[trains], dataset.compared[trains[: len(dataset.compared)]]
    # People are compared with people.
    of_people = (~dataset.by_machine[trains]).float()
    factors = torch.ones(count)
    for significant in (0.0, SIGNIFICANT):
        weighed = scaled(train, factors[voters] * of_people)
        found = verdicts(features, weighed, voters, compared, count, spec, settings, generator)
        factors = trust(found, significant)
    votes = scaled(dataset.votes, factors[dataset.voters])
    return replace(dataset, votes=votes, reliability=factors), factors


def trust(found: Verdicts, significant: float = SIGNIFICANT) -> Tensor:
    """(U,) factor of each voter's weight."""
    factors = (1 - kinds(found.right, found.heard, significant).against).float()
    if int((found.sided > 0).sum()) < MIN_VOTERS:
        return factors
    return torch.where(torch.tensor(one_sided(found)) < LEVEL, 0.0, factors)


def one_sided(found: Verdicts) -> list[float]:
    """The p-value of each voter's share of A, corrected for the number of voters."""
    sides = zip(found.named_a.tolist(), found.sided.tolist(), strict=True)
    return holm([either_side(int(a), int(sided)) if sided else None for a, sided in sides])


def scaled(votes: VoteTensors, factors: Tensor) -> VoteTensors:
    """The votes with weights multiplied by `factors` (C + M,)."""
    c, m = factors.split([len(votes.a), len(votes.thumb)])
    return replace(votes, choice_weight=votes.choice_weight * c, thumb_weight=votes.thumb_weight * m)


def kinds(right: Tensor, heard: Tensor, significant: float = SIGNIFICANT) -> VoteKinds:
    """Fits a binomial mixture of the rates q, a half and 1 - q to each voter's right verdicts out of those heard, both
    (U,). Nobody is against the others if the evidence for that kind is not above `significant`."""
    right, heard = right.double(), heard.double()
    *_, least = mixture(right, heard, torch.tensor([0.8, 0.2, 0.0]))
    three, shares, rate, most = mixture(right, heard, torch.tensor([0.8, 0.1, 0.1]))
    evidence = 2 * (most - least)
    clear = int((heard > 0).sum()) >= MIN_VOTERS and evidence > significant and shares[2] < shares[0]
    return VoteKinds(three[:, 2] if clear else torch.zeros_like(right), shares, rate, evidence)


def mixture(right: Tensor, heard: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """(U, 3) probabilities of each voter's kind, (3,) shares, the rate q and the log-likelihood at the end of EM from
    `shares` and q = 0.7; a share of zero stays zero. q stays within 0.55 and 0.95, or the kinds would merge."""
    shares, rate = shares.double(), 0.7

    def log_joint() -> Tensor:
        rates = torch.tensor([rate, 0.5, 1 - rate], dtype=right.dtype)
        return right[:, None] * rates.log() + (heard - right)[:, None] * (1 - rates).log() + shares.log()

    for _ in range(EM_STEPS):
        kind = log_joint().softmax(dim=1)
        shares = kind.mean(dim=0)
        said = ((kind[:, 0] + kind[:, 2]) * heard).sum()
        agreed = (kind[:, 0] * right + kind[:, 2] * (heard - right)).sum()
        rate = min(max(float(agreed / said.clamp(min=1e-9)), 0.55), 0.95)
    joint = log_joint()
    return joint.softmax(dim=1), shares, rate, float(joint.logsumexp(dim=1).sum())


def verdicts(
    features: Tensor,
    votes: VoteTensors,
    voters: Tensor,
    compared: Tensor,
    count: int,
    spec: FeatureSpec,
    settings: RewardSettings,
    generator: torch.Generator,
) -> Verdicts:
    """The verdicts of `count` voters: `voters` (C + M,) cast the votes, `compared` (C,) says which choices were between
    two answers that were shown. A correction was not: its writer named no slot, and nobody else writes such answers."""
    if len(votes) < MIN_VOTES:
        return Verdicts(*torch.zeros(4, count, dtype=torch.long))
    chooser, thumber = voters.split([len(votes.a), len(votes.thumb)])
    fold = torch.randperm(count, generator=generator) % settings.folds
    numbers = torch.arange(settings.folds)[:, None]
    answers, votes = fitting.reduced(features, votes, spec)
    heads = fitting.fit(
        answers,
        votes,
        torch.full((settings.folds,), settings.signal_l2),
        settings.label_smoothing,
        choice_weight=(fold[chooser] != numbers).float(),
        thumb_weight=(fold[thumber] != numbers).float(),
    )
    scores = heads.scores(answers)
    decisive = compared & ((votes.outcome == A) | (votes.outcome == B))
    up, down = thumb_pairs(votes.thumb, thumber)
    better = torch.cat([torch.where(votes.outcome == A, votes.a, votes.b)[decisive], votes.response[up]])
    worse = torch.cat([torch.where(votes.outcome == A, votes.b, votes.a)[decisive], votes.response[down]])
    user = torch.cat([chooser[decisive], thumber[up]])
    delta = scores[fold[user], better] - scores[fold[user], worse]

    def per_voter(user: Tensor) -> Tensor:
        return torch.bincount(user, minlength=count)

    return Verdicts(
        # If the others said nothing, neither does their model.
        heard=per_voter(user[delta != 0]),
        right=per_voter(user[delta > 0]),
        sided=per_voter(chooser[decisive]),
        named_a=per_voter(chooser[decisive & (votes.outcome == A)]),
    )


def thumb_pairs(thumb: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) positions of thumbs up and of thumbs down: each voter's first up with the first down, and so on, each thumb
    once. In pairs a voter's bar does not matter: a voter who is hard to please contradicts nobody."""
    waiting: dict[tuple[int, bool], list[int]] = {}
    pairs: list[tuple[int, int]] = []
    for number, (one, who) in enumerate(zip((thumb > 0).tolist(), user.tolist(), strict=True)):
        if others := waiting.get((who, not one)):
            other = others.pop(0)
            pairs.append((number, other) if one else (other, number))
        else:
            waiting.setdefault((who, one), []).append(number)
    up, down = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(dim=1)
    return up, down
