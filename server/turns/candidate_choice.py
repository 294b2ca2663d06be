"""Chooses a comparison's second answer: the one on which the reward model's members disagree most.

The members are fits of one reward model to different draws of the votes. They may disagree on which of two answers is
better, and a vote where they do is worth most. A comparison does not depend on their scores: if they are missing or
late, it shows the first candidate, which is as good as any.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import pvariance
from typing import Protocol

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Scores of several answers to one prompt, one by each member of the reward model."""

    reward_model_version: str
    member_scores: list[list[float]]


class ScoresError(Exception):
    """No scores are available; the message says why."""


class Scorer(Protocol):
    """Scores answers with the newest reward model."""

    async def score(self, prompt: list[int], answers: list[list[int]]) -> Scores:
        """Score answers, each given as all its token ids. Raises ScoresError, also if it takes too long."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Chosen:
    """Index of the chosen candidate, and the version of the reward model that chose it; None without scores."""

    index: int
    reward_model_version: str | None


class CandidateChooser:
    """Chooses a candidate by the scores of `scorer`, unless their reward model reads another model's token ids, by its
    version: while a model is changed, this server and the scorer may not have the same."""

    def __init__(self, scorer: Scorer, reads_ours: Callable[[str], Awaitable[bool]]) -> None:
        self._scorer = scorer
        self._reads_ours = reads_ours
        self._complaint = ""

    async def choose(self, prompt: list[int], first: list[int], candidates: list[list[int]]) -> Chosen:
        """Choose the candidate to show beside `first`; all are token ids. Does not fail if the scorer does."""
        try:
            scores = await self._scorer.score(prompt, [first, *candidates])
        except ScoresError as error:
            self._complain(f"{error}")
            return Chosen(0, None)
        if not await self._reads_ours(scores.reward_model_version):
            self._complain(f"{scores.reward_model_version} was fitted for another model than this server's")
            return Chosen(0, None)
        self._complain("")
        one, *others = scores.member_scores
        disputes = [dispute(one, other) for other in others]
        return Chosen(disputes.index(max(disputes)), scores.reward_model_version)

    async def close(self) -> None:
        await self._scorer.close()

    def _complain(self, complaint: str) -> None:
        # Log each change once, not with every comparison.
        if complaint != self._complaint:
            log.warning("comparisons: %s", f"no scores: {complaint}" if complaint else "scores are available again")
        self._complaint = complaint


def dispute(one: list[float], other: list[float]) -> float:
    """Variance, over the members, of the probability that `one` is better; both hold one score per member."""
    # A sigmoid that does not overflow for large differences.
    return pvariance((1 + math.tanh((a - b) / 2)) / 2 for a, b in zip(one, other, strict=True))
