# Copied from clients/interval.py by `make docs`: write there, not here.
"""Confidence interval of a win rate."""

from math import sqrt

Z95 = 1.959964


def wilson(wins: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of the share `wins / n`; a tie counts as half a win. 95 % by default.

    Wilson, E. B. (1927), JASA 22, 209-212. Unlike the normal interval it stays within 0 to 1 and does not collapse at
    either end. With ties it is slightly too wide, never too narrow.
    """
    if n < 1:
        raise ValueError("An interval needs at least one comparison.")
    share = wins / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half
