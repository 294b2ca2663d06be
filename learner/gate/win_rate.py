"""How often a candidate wins, and how certain that is.

The judge is a head fitted on judge votes alone. A candidate wins on a prompt if its answer scores above its opponent's
(a draw is half). The interval is a bootstrap over prompts and over the judge's votes at once: each refit of the judge
sees its own draw of conversations, and its win rate is taken over its own draw of prompts. An interval over prompts
alone would ignore that the judge may be wrong.

Prompts come in batches, with a look after each (a group-sequential design: Pocock 1977). More prompts reduce only the
prompts' part of the error; the judge's part stays, so looks are alike, and what they cost together depends on it.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from learner.reward.evaluation import LIKE_LENGTH
from learner.reward.linear_heads import VoteTensors, bootstrap, fit, span_basis
from learner.reward.standardiser import Standardiser
from server.store.learning.round_metrics import WinRate

# Draws for the error of several looks.
DRAWS = 200_000


@dataclass(frozen=True)
class Wins:
    """A candidate's share of wins on each of N prompts, (N,), and by each of K refits of the judge, (K, N)."""

    point: Tensor
    refits: Tensor

    @property
    def prompts_sd(self) -> float:
        """Standard error of the win rate if the judge were right."""
        return float(self.point.std(correction=0)) / math.sqrt(len(self.point))

    @property
    def judge_sd(self) -> float:
        """Standard error of the win rate because of the judge's votes."""
        return float(self.refits.mean(dim=1).std())


def look_tail(judge_sd: float, prompts_sd: float, looks: list[int], prompts: int, tail: float) -> float:
    """The error on one side of each look, such that all of them together err with probability `tail`.

    `looks` are the numbers of prompts at which one looks, `prompts` that of `prompts_sd`. The errors of two looks
    correlate by what they share: the judge's votes, and the prompts of the earlier."""
    ends = torch.tensor(looks, dtype=torch.float64)
    shared = torch.maximum(ends[:, None], ends)
    covariance = judge_sd**2 + prompts_sd**2 * prompts / shared + 1e-9 * torch.eye(len(looks), dtype=torch.float64)
    sd = covariance.diagonal().sqrt()
    normal = torch.randn(DRAWS, len(looks), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    highest = (normal @ torch.linalg.cholesky(covariance / sd[:, None] / sd).mT).amax(dim=1)
    bound = torch.quantile(highest, 1 - tail)
    return float(torch.special.ndtr(-bound))


@dataclass(frozen=True)
class Judge:
    """One head on all judge votes and K refits, in the coordinates of `basis`."""

    standardise: Standardiser
    basis: Tensor  # (F, P)
    point: Tensor  # (1, P)
    refits: Tensor  # (K, P)

    def scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(1, N) and (K, N) scores of answers with features (N, F)."""
        reduced = self.standardise(features) @ self.basis
        return self.point @ reduced.mT, self.refits @ reduced.mT


def fit_judge(
    features: Tensor,
    votes: VoteTensors,
    standardise: Standardiser,
    l2: float,
    label_smoothing: float,
    refits: int,
    generator: torch.Generator,
) -> Judge:
    """Fits the judge to judge votes on answers with features (N, F)."""
    voted, votes = votes.voted(features)
    standard = standardise(voted)
    basis = span_basis(standard)
    reduced = standard @ basis
    point = fit(reduced, votes, torch.tensor([l2]), label_smoothing)
    many = bootstrap(reduced, votes, l2, label_smoothing, refits, generator)
    return Judge(standardise, basis, point.weights, many.weights)


def wins(delta: Tensor) -> Tensor:
    """1 above zero, 0.5 at zero, 0 below."""
    return (torch.sign(delta) + 1) / 2


def compare(judge: Judge, ours: Tensor, theirs: Tensor, prompts: int) -> Wins:
    """Compares answers `ours` with `theirs`, features (N * M, F): M answers to each of N prompts, grouped by prompt.
    Each of our answers is compared with each of theirs to the same prompt."""
    point, refits = (by_prompt(a, b, prompts) for a, b in zip(judge.scores(ours), judge.scores(theirs), strict=True))
    return Wins(point[0], refits)


def win_rate(won: Wins, looks: list[int], confidence: float, generator: torch.Generator) -> WinRate:
    """The win rate and its two-sided interval, which holds for all `looks` together. Prompts are drawn with their
    answers."""
    k, n = won.refits.shape
    tail = look_tail(won.judge_sd, won.prompts_sd, looks, n, (1 - confidence) / 2)
    drawn = torch.randint(n, (k, n), generator=generator)
    rates = won.refits.gather(1, drawn).mean(dim=1)
    low, high = torch.quantile(rates, torch.tensor([tail, 1 - tail])).tolist()
    return WinRate(float(won.point.mean()), low, high, n, won.prompts_sd, won.judge_sd)


def looks(prompts: int, batch: int) -> list[int]:
    """The numbers of prompts at which the gate looks: after each batch."""
    return [min(start + batch, prompts) for start in range(0, prompts, batch)]


def more_prompts_help(rate: WinRate, confidence: float) -> bool:
    """Whether an undecided win rate might be decided by more prompts, or the judge's own error is too large for any.
    `confidence` is that of its two-sided interval."""
    undecided = rate.low <= 0.5 <= rate.high
    errors = NormalDist().inv_cdf((1 + confidence) / 2)
    return undecided and abs(rate.rate - 0.5) + errors * rate.prompts_sd > errors * rate.judge_sd


def by_prompt(ours: Tensor, theirs: Tensor, prompts: int) -> Tensor:
    """(K, N) share of wins on each prompt, from scores (K, N * M)."""
    ours, theirs = (scores.view(len(scores), prompts, -1) for scores in (ours, theirs))
    return wins(ours[:, :, :, None] - theirs[:, :, None]).mean(dim=(2, 3))


def length_matched(judge: Judge, ours: Tensor, theirs: Tensor) -> tuple[float, int]:
    """The point win rate over answers of similar length to their opponent's (the last feature is log length), and their
    number; NaN if there are none. Answers are compared in order."""
    delta = judge.scores(ours)[0] - judge.scores(theirs)[0]
    alike = (ours[:, -1] - theirs[:, -1]).abs() <= LIKE_LENGTH
    return float(wins(delta)[0, alike].mean()), int(alike.sum())
