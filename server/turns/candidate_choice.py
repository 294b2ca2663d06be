"""Which second answer to show: the one about which the reward model's members disagree most whether it is better.

The members are fits of one reward model to different draws of the votes; a vote on what they dispute says most. A
comparison never needs their scores: without them, or without them in time, the first candidate does, which is as good
as any.
"""

import logging
import math
from dataclasses import dataclass
from statistics import pvariance
from typing import Protocol

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Of some answers to one prompt, a score by each member of the reward model."""

    reward_model_version: str
    member_scores: list[list[float]]


class ScoresError(Exception):
    """There are no scores; the message says why."""


class Scorer(Protocol):
    """Scores answers by the newest reward model."""

    async def score(self, prompt: list[int], answers: list[list[int]]) -> Scores:
        """Of every answer, all token ids. Raises ScoresError, also where it takes too long."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Chosen:
    """Which of the candidates, and the reward model whose members dispute it most; None where nobody was heard."""

    index: int
    reward_model_version: str | None


class CandidateChooser:
    """Chooses by the scores of `scorer`."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._complaint = ""

    async def choose(self, prompt: list[int], first: list[int], candidates: list[list[int]]) -> Chosen:
        """The candidate to show beside `first`; all are token ids. Whatever becomes of the scorer, there is one."""
        try:
            scores = await self._scorer.score(prompt, [first, *candidates])
        except ScoresError as error:
            self._complain(f"{error}")
            return Chosen(0, None)
        self._complain("")
        one, *others = scores.member_scores
        disputes = [dispute(one, other) for other in others]
        return Chosen(disputes.index(max(disputes)), scores.reward_model_version)

    async def close(self) -> None:
        await self._scorer.close()

    def _complain(self, complaint: str) -> None:
        # Once, not with every comparison.
        if complaint != self._complaint:
            log.warning("comparisons: %s", f"any two, for want of scores: {complaint}" if complaint else "chosen again")
        self._complaint = complaint


def dispute(one: list[float], other: list[float]) -> float:
    """Variance, over the members, of the probability that `one` is better; both hold a score by each member."""
    # A sigmoid that no difference is too large for.
    return pvariance((1 + math.tanh((a - b) / 2)) / 2 for a, b in zip(one, other, strict=True))
