"""What the learner's rounds came to, for the metrics: read from the store, since a round's process is soon gone."""

import math

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
    votes, model, gate = metrics.votes, metrics.reward_model, metrics.gate
    return {
        "votes": float(votes.train + votes.judge) if votes else 0.0,
        "reward_accuracy": model.accuracy if model else math.nan,
        "kl": gate.chosen.kl if gate else math.nan,
        "win_rate": gate.chosen.against_incumbent.rate if gate else math.nan,
        "seconds": (round_.finish_time or round_.create_time) - round_.create_time,
        "finish_time": math.nan if round_.finish_time is None else round_.finish_time,
    }
