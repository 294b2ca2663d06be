"""How often a candidate wins, and how certain that is.

The judge is a head fitted on judge votes alone. A candidate wins on a prompt if its answer scores above its opponent's
(a draw is half). The interval is a bootstrap over prompts and over the judge's votes at once: each refit of the judge
sees its own draw of conversations, and its win rate is taken over its own draw of prompts. An interval over prompts
alone would ignore that the judge may be wrong.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.reward.evaluation import LIKE_LENGTH
from learner.reward.linear_heads import VoteTensors, bootstrap, fit, span_basis
from learner.reward.standardiser import Standardiser
from learner.settings import GateSettings
from server.store.learning.round_metrics import WinRate

# A first look at fewer prompts would rarely be clear.
FIRST_PROMPTS = 16


@dataclass(frozen=True)
class Look:
    """A look at the held-out prompts: how many, and the confidence of the win rates' two-sided intervals."""

    prompts: int
    confidence: float


def looks(prompts: int, settings: GateSettings) -> list[Look]:
    """When to judge: at half of the prompts, where a clear case ends the gate, and at all of them.

    The error allowed to a single look is divided between the two, so that together they err no more often than it,
    however they depend on each other (the union bound)."""
    error = 1 - settings.confidence
    early = settings.early_share * error
    first, rest = Look(prompts // 2, 1 - early), Look(prompts, 1 - (error - early))
    return [first, rest] if early and first.prompts >= FIRST_PROMPTS else [Look(prompts, settings.confidence)]


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


def win_rate(
    judge: Judge, ours: Tensor, theirs: Tensor, prompts: int, confidence: float, generator: torch.Generator
) -> WinRate:
    """Win rate of answers `ours` over `theirs`, features (N * M, F): M answers to each of N prompts, grouped by prompt.
    Each of our answers is compared with each of theirs to the same prompt; prompts are drawn with their answers."""
    point, refits = (by_prompt(a, b, prompts) for a, b in zip(judge.scores(ours), judge.scores(theirs), strict=True))
    k = len(refits)
    drawn = torch.randint(prompts, (k, prompts), generator=generator)
    rates = refits.gather(1, drawn).mean(dim=1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(rates, torch.tensor([tail, 1 - tail])).tolist()
    return WinRate(float(point.mean()), low, high, prompts)


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
