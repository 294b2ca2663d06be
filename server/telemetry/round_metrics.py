"""What the learner's rounds came to, for the metrics: read from the store, since a round's process is soon gone."""

from typing import Any

from server.store.learning.records import Round
from server.store.store import Store
from server.telemetry.metrics import ROUND, ROUNDS


def show_rounds(store: Store) -> None:
    """Sets the metrics of rounds to what the store says now."""
    for state, count in store.rounds.count().items():
        ROUNDS.labels(state).set(count)
    newest = next((found for found in store.rounds.page(10, None) if found.finish_time), None)
    for figure, value in figures(newest).items() if newest else ():
        ROUND.labels(figure).set(value)


def figures(round_: Round) -> dict[str, float]:
    """What a round got to; NaN for what it did not, so that no figure of an older round stands there."""
    metrics = round_.metrics
    chosen = _at(metrics, "gate", "chosen")
    found = {
        "votes": sum((_at(metrics, "votes", side) or 0) for side in ("train", "judge")),
        "reward_accuracy": _at(metrics, "reward_model", "accuracy"),
        "kl": _at(chosen, "kl"),
        "win_rate": _at(chosen, "against_incumbent", "rate"),
        "seconds": (round_.finish_time or round_.create_time) - round_.create_time,
        "finish_time": round_.finish_time,
    }
    return {name: float("nan") if value is None else float(value) for name, value in found.items()}


def _at(tree: Any, *path: str) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
