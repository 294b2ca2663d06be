"""The processes that train one policy together.

Every worker has the whole batch, and passes its share of it through the policy. What each has found is added up, so
that all go on with the same numbers. A pass over a sharded policy (`learner.model.sharding`) needs all workers at
once, so each makes as many.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerGroup:
    """One of `count` workers. Without more than one nothing is exchanged."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the worker that writes files."""
        return self.rank == 0

    def turns(self, parts: list[Tensor]) -> Iterator[tuple[Tensor, bool]]:
        """This worker's parts, and whether they count. A worker that is short of one repeats another's, so that all
        have as many."""
        for start in range(0, len(parts), self.count):
            number = start + self.rank
            counts = number < len(parts)
            yield parts[number if counts else start], counts

    def add(self, *tensors: Tensor) -> None:
        """Adds up each over the workers, in place."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def shares(self, count: int) -> list[range]:
        """Each worker's of `count` things in a row."""
        ends = [count * rank // self.count for rank in range(self.count + 1)]
        return [range(*both) for both in pairwise(ends)]

    def gather(self, items: list[T]) -> list[T]:
        """The items of all workers, in order."""
        if self.count == 1:
            return items
        gathered: list[list[T]] = [[] for _ in range(self.count)]
        distributed.all_gather_object(gathered, items)
        return [item for each in gathered for item in each]

    def leaders(self, value: T) -> T:
        """The value that the worker who leads has. What decides how training goes on must not differ by rounding."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Returns when all workers have come here."""
        self.leaders(None)


ALONE = WorkerGroup()
