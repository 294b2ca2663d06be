"""Which of two versions wins the votes, and how certain that is, however often it is checked; and once at the end.

The evidence is an e-value. The null hypothesis is that the one is at least as good as the other. The alternative gives
every win rate p below a half the same weight, and e = 2 * integral over (0, 1/2) of p^wins (1 - p)^losses dp /
(1/2)^(wins + losses). While the null holds, e is expected to fall, and the chance that it ever reaches 1 / alpha is at
most alpha (Ville 1939; Ramdas et al. 2023, "Game-theoretic statistics and safe anytime-valid inference"), so it may be
checked after every vote.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

# Stakes of `mean_e_value`, of the at most 2 that keep a product positive. Few, since each more dilutes the best.
STAKES = (0.5, 1.0, 1.5, 1.9)


def e_value(wins: int, losses: int) -> float:
    """E-value against a win rate of a half or more; 1 before the first vote.

    The integral is an incomplete beta function; for whole numbers it is a sum of binomials."""
    n = wins + losses
    tail = sum(math.comb(n + 1, k) for k in range(wins + 1, n + 2))
    return tail / ((n + 1) * math.comb(n, wins))


def mean_e_value(means: Sequence[float]) -> float:
    """E-value against a mean of a half or less, of independent `means` in [0, 1], such as the share of a user's choices
    that were won. It bets on each in turn (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
    betting", JRSS B 2024), with every stake at once; for choices won or lost it is about `e_value`. 1 without any."""
    return sum(math.prod(1 + stake * (mean - 0.5) for mean in means) for stake in STAKES) / len(STAKES)


def chance_of(means: Sequence[float]) -> float:
    """The chance that means as far from a half as these, each above or below it at random, have as large a sum: the
    exact sign-flip test against no preference, for one look (Fisher 1935, section 21). 1 without any."""
    sums, total = {0.0: 1.0}, sum(mean - 0.5 for mean in means)
    for distance, count in Counter(round(abs(mean - 0.5), 6) for mean in means).items():
        weights = [math.comb(count, above) / 2**count for above in range(count + 1)]
        found: dict[float, float] = defaultdict(float)
        for before, chance in sums.items():
            for above, weight in enumerate(weights):
                found[round(before + distance * (2 * above - count), 6)] += chance * weight
        sums = found
    return sum(chance for reached, chance in sums.items() if reached >= total - 1e-6 * (1 + len(means)))


@dataclass(frozen=True)
class CanaryResult:
    """Choices between a canary and its opponent: shares of them that the canary won, each of one choice or of one
    user's, a tie being half; and the number of choices in them."""

    means: tuple[float, ...]
    votes: int

    @property
    def better(self) -> float:
        """Evidence that the canary is better."""
        return mean_e_value(self.means)

    @property
    def worse(self) -> float:
        """Evidence that it is worse."""
        return mean_e_value([1 - mean for mean in self.means])

    def __str__(self) -> str:
        won = sum(self.means) / len(self.means) if self.means else 0.5
        evidence = f"evidence that it is better {self.better:.3g}, worse {self.worse:.3g}"
        return f"it won {won:.2f} of {self.votes} choices, {evidence}"


@dataclass(frozen=True)
class AbTestResult:
    """Choices between answers of `version` and of `opponent`, shown blind."""

    version: str
    opponent: str
    wins: int
    losses: int
    # Ties and both-bad, which do not say which is better.
    draws: int
    # How many people vote here, if so few that several votes of each count; 0 if everybody counts once.
    few_voters: int = 0

    @property
    def lost(self) -> float:
        """Evidence that `version` is worse."""
        return e_value(self.wins, self.losses)

    @property
    def won(self) -> float:
        """Evidence that `version` is better."""
        return e_value(self.losses, self.wins)

    def __str__(self) -> str:
        counted = f", several votes of each of the {self.few_voters} who vote here" if self.few_voters > 1 else ""
        counted = ", all by the one who votes here" if self.few_voters == 1 else counted
        return f"{self.wins} wins, {self.losses} losses and {self.draws} draws against {self.opponent}{counted}"
