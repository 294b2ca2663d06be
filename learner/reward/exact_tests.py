"""Exact tails of a fair coin and of a Poisson count, and Holm's correction. No torch: `learner status` uses them."""

import math
from collections.abc import Sequence


def at_most(heads: int, tosses: int) -> float:
    """P(X <= heads) for so many tosses of a fair coin. Integers up to the last division: exact at any size."""
    ways = total = 1 if heads >= 0 else 0
    for k in range(1, min(heads, tosses) + 1):
        ways = ways * (tosses - k + 1) // k
        total += ways
    # Python divides two integers correctly even if neither fits a float.
    return total / (1 << tosses)


def either_side(heads: int, tosses: int) -> float:
    """Two-sided p-value: the probability that a fair coin comes out at least as uneven."""
    return min(1.0, 2 * at_most(min(heads, tosses - heads), tosses))


def at_least(count: int, mean: float) -> float:
    """P(X >= count) of a Poisson count. Summed from `count` upwards, since one minus the rest would cancel."""
    term = total = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
    while term > 1e-17 * total:
        count += 1
        term *= mean / count
        total += term
    return min(1.0, total)


def holm(p_values: Sequence[float | None]) -> list[float]:
    """P-values corrected for their number (Holm 1979): at any level, the chance of a false alarm among all of them is
    at most that level. None, if there was nothing to test, is not counted and becomes 1."""
    order = sorted((p_value, i) for i, p_value in enumerate(p_values) if p_value is not None)
    corrected, highest = [1.0] * len(p_values), 0.0
    for rank, (p_value, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_value))
        corrected[i] = highest
    return corrected
