"""Round metrics for tests, in which unspecified numbers are zero."""

from dataclasses import fields
from typing import Any, TypeVar

from server.store.learning.round_metrics import AnswerHealth, CandidateMetrics, GateMetrics, WinRate

T = TypeVar("T")


def filled(kind: type[T], **values: Any) -> T:
    """A record of this kind, with zero for every number that is not given."""
    zero: Any = {field.name: 0 for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{**zero, **values})


def candidate_metrics(step: int, kl: float = 0.0, rate: float = 0.5, length: float = 60.0) -> CandidateMetrics:
    """A candidate with win rate `rate` against both the incumbent and the reference."""
    won = WinRate(rate, rate - 0.1, rate + 0.1, prompts=64)
    health = filled(AnswerHealth, length=length)
    rates = {"against_incumbent": won, "against_reference": won, "against_best": None, "loses_to": []}
    return filled(CandidateMetrics, step=step, kl=kl, health=health, **rates)


def gate_metrics(chosen: CandidateMetrics, *others: CandidateMetrics) -> GateMetrics:
    """Metrics of a gate that chose `chosen`."""
    return GateMetrics(chosen, [], [*others, chosen], filled(AnswerHealth, length=62.6))
