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
    """One pass of supervised fine-tuning; number 0 is before the first. Losses are in nats per token: the weighted mean
    of the pass, and after it that of the examples held out, and each one's."""

    number: int
    loss: Figure
    held_out: Figure
    each: list[float]
    grad_norm: Figure


@dataclass(frozen=True)
class FineTuned:
    """Supervised fine-tuning: its examples, all passes, and the one whose weights were kept, 0 if none were."""

    demonstrations: int
    corrections: int
    # Of demonstrations and corrections: those whose text this model cannot read, or which are too long.
    left_out: int
    users: int
    # Weighted mean tokens of the answers to imitate.
    length: Figure
    epochs: list[Epoch]
    chosen: int
    # By how much the loss on the examples held out fell, at least: a one-sided 95 % bound over their topics.
    fall_low: Figure

    @property
    def before(self) -> float:
        """The loss on the examples held out, before and after."""
        return self.epochs[0].held_out

    @property
    def after(self) -> float:
        return self.epochs[self.chosen].held_out

    @property
    def carries_over(self) -> bool:
        """Whether what was learned surely helps where it was not shown."""
        return self.chosen > 0 and self.fall_low > 0

    def __str__(self) -> str:
        return f"{self.before:.3f} -> {self.after:.3f} nats per token, a fall of at least {self.fall_low:.3f}"
