"""Whether a judge's choices depend on the order of the answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.store.chats.machine_choices import MachineChoice


@dataclass(frozen=True)
class Bias:
    """Of `pairs` comparisons judged in both orders: how often the same answer won or both were ties, and how often the
    answer in the same place won, the first or the second."""

    pairs: int
    consistent: int
    first: int
    second: int

    def __str__(self) -> str:
        if not self.pairs:
            return "It has judged nothing in both orders."
        return (
            f"With the answers swapped it said the same of {self.consistent / self.pairs:.0%} of {self.pairs} "
            f"comparisons; in both orders it named the first answer in {self.first / self.pairs:.0%} and the second in "
            f"{self.second / self.pairs:.0%}."
        )


def bias_of(choices: Sequence[MachineChoice]) -> Bias:
    """The bias in these choices; those that could not be read do not count."""
    read = [one for one in choices if one.choice]
    consistent = sum(one.shown == one.swapped for one in read)
    # Swapped, the comparison's B comes first.
    first = sum((one.shown, one.swapped) == ("A", "B") for one in read)
    second = sum((one.shown, one.swapped) == ("B", "A") for one in read)
    return Bias(len(read), consistent, first, second)
