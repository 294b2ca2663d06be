"""Metrics of supervised fine-tuning, and the type of a metric."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

# A metric that could not be measured is NaN here and null in JSON.
Figure = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: None if math.isnan(value) else value),
]


@dataclass(frozen=True)
class Epoch:
    """One pass of supervised fine-tuning; number 0 is before the first. Losses are in nats per token: the mean of the
    pass, and that of each example held out after it."""

    number: int
    loss: Figure
    held_out: list[float]
    grad_norm: Figure

    @property
    def mean_nll(self) -> float:
        """The loss on the examples held out."""
        return sum(self.held_out) / len(self.held_out)


@dataclass(frozen=True)
class FineTuned:
    """Supervised fine-tuning: its examples, all passes, and the one whose weights were kept, 0 if none were."""

    demonstrations: int
    corrections: int
    # Of demonstrations and corrections: those whose text this model cannot read, or which are too long.
    left_out: int
    users: int
    # Mean tokens of the answers to imitate.
    length: Figure
    epochs: list[Epoch]
    chosen: int

    @property
    def before(self) -> float:
        """The loss on the examples held out, before and after."""
        return self.epochs[0].mean_nll

    @property
    def after(self) -> float:
        return self.epochs[self.chosen].mean_nll

    @property
    def improved(self) -> int:
        """How many of the examples held out have a lower loss."""
        pairs = zip(self.epochs[0].held_out, self.epochs[self.chosen].held_out, strict=True)
        return sum(after < before for before, after in pairs)

    def __str__(self) -> str:
        count = len(self.epochs[0].held_out)
        return f"{self.before:.3f} -> {self.after:.3f} nats per token, lower in {self.improved} of {count}"
