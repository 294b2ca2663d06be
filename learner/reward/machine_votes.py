"""How much the choices of a machine judge count: as much as it agrees with people where both chose."""

from collections.abc import Sequence
from dataclasses import dataclass

from learner.reward.interval import wilson
from server.store.chats.records import ChoiceVote

# With fewer pairs that people and the judge both decided, nothing is known about it, and its choices do not count.
MIN_PAIRS = 20


@dataclass(frozen=True)
class Agreement:
    """On `pairs` comparisons both people and the judge named a winner; `agreed` times the same."""

    pairs: int
    agreed: int

    @property
    def rate(self) -> float:
        """The expected share of agreement, from a uniform prior."""
        return (self.agreed + 1) / (self.pairs + 2)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share of agreement."""
        return wilson(self.agreed, self.pairs)

    @property
    def weight(self) -> float:
        """What one of its choices counts, where a person's counts one: (2 a - 1)^2, the information in a choice that
        is flipped in the share 1 - a of the cases; none if it agrees no more often than a coin."""
        return max(2 * self.rate - 1, 0.0) ** 2 if self.pairs >= MIN_PAIRS else 0.0


def agreement(machine: Sequence[ChoiceVote], people: Sequence[ChoiceVote]) -> Agreement:
    """How often the judge names the winner that people named, on comparisons that both decided."""
    said = {vote.comparison_id: vote.choice for vote in machine if vote.choice in ("A", "B")}
    both = [
        vote.choice == said[vote.comparison_id]
        for vote in people
        if vote.comparison_id in said and vote.choice in ("A", "B")
    ]
    return Agreement(len(both), sum(both))


def machine_weight(trust: float, votes: int, people: float, share: float) -> float:
    """The weight of each of the judge's `votes`: `trust`, but together at most `share` of all weights, of which those
    of people are `people`. A share of 1 is no bound."""
    if not votes or share == 1:
        return trust
    return min(trust, share / (1 - share) * people / votes)
