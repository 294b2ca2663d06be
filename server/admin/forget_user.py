"""Deletes a user or rewrites the database from the command line, also while a server runs."""

import time
from collections.abc import Iterator
from pathlib import Path

from server.store.files.residue import erase
from server.store.store import Store

# How long a call may take from its admission to its first write: the edge waits ten seconds for its message.
LET_IN_SECONDS = 12.0
EMPTIED = "No deleted data is left in the database's files."
NOT_EMPTIED = (
    "Another process keeps reading the database, so its log (prefloop.db-wal) still has deleted data. A running server "
    "tries again every hour; `server compact` tries again now."
)


def forget(store: Store, data_dir: Path, user: str, poll_seconds: float) -> Iterator[str]:
    """Delete all data of a user, and yield sentences about the progress."""
    store.keys.forget(user)
    kept = store.deletion.look(user)
    _forget_rows(store, user)
    if store.replicas.alive():
        yield "Waiting for calls that a running server admitted earlier."
        time.sleep(LET_IN_SECONDS + poll_seconds)
        _forget_rows(store, user)
    yield "Deleted."
    if versions := [*kept.policy_versions, *kept.reward_model_versions]:
        yield f"Trained on these votes and unchanged: {', '.join(versions)}."
    if kept.running_round_ids:
        yield f"Still running on them: {', '.join(kept.running_round_ids)}; what it publishes is trained on them, too."
    yield compact(data_dir)


def compact(data_dir: Path) -> str:
    """Rewrite the database if something was deleted since the last time."""
    return EMPTIED if erase(data_dir, rewrite=True) else NOT_EMPTIED


def _forget_rows(store: Store, user: str) -> None:
    while store.deletion.step(user):
        pass
