"""Metrics of the learner's rounds, read from the store, since a round's process is short-lived; and of the disk."""

import math
import shutil
from pathlib import Path
from typing import get_args

from server.store.learning.records import PointerAction, Round, RoundState
from server.store.store import Store
from server.telemetry.metrics import ACTIVATIONS, DISK, ROUND, ROUNDS


def show_rounds(store: Store) -> None:
    """Set the metrics of rounds from the store."""
    # Also what never happened: an alert sees a rise from zero, and no rise where a series begins.
    for state, count in {**dict.fromkeys(get_args(RoundState), 0), **store.rounds.count()}.items():
        ROUNDS.labels(state).set(count)
    for action, count in {**dict.fromkeys(get_args(PointerAction), 0), **store.policies.activations()}.items():
        ACTIVATIONS.labels(action).set(count)
    newest = next((found for found in store.rounds.page(10, None) if found.finish_time), None)
    for figure, value in figures(newest).items() if newest else ():
        ROUND.labels(figure).set(value)


def show_disk(data_dir: Path) -> None:
    """Set the metrics of the disk that the data directory is on."""
    usage = shutil.disk_usage(data_dir)
    DISK.labels("free").set(usage.free)
    DISK.labels("total").set(usage.total)


def figures(round_: Round) -> dict[str, float]:
    """A round's metrics; NaN for stages that it did not reach, so that no value of an older round remains."""
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
