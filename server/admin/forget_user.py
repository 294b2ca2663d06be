"""What the command line does to a data directory, also while a server runs on it."""

import time
from collections.abc import Iterator
from pathlib import Path

from server.store.files.residue import erase
from server.store.store import Store

# How long a call may take from being let in to having written: the edge waits ten seconds for its message.
LET_IN_SECONDS = 12.0
EMPTIED = "Nothing of what was removed is left in the database's files."
NOT_EMPTIED = (
    "Another process keeps reading the database, whose log (prefloop.db-wal) still holds what was removed. A running "
    "server tries again every hour; `server compact` does at once."
)


def forget(store: Store, data_dir: Path, user: str, poll_seconds: float) -> Iterator[str]:
    """Removes all that is kept of a user, a sentence at a time."""
    store.keys.forget(user)
    kept = store.deletion.look(user)
    _forget_rows(store, user)
    if store.replicas.alive():
        yield "Waiting for calls that a running server had let in before."
        time.sleep(LET_IN_SECONDS + poll_seconds)
        _forget_rows(store, user)
    yield "Removed."
    if versions := [*kept.policy_versions, *kept.reward_model_versions]:
        yield f"Trained on these votes, and as they were: {', '.join(versions)}."
    if kept.running_round_ids:
        yield f"Under way with them: {', '.join(kept.running_round_ids)}; what it publishes is trained on them, too."
    yield compact(data_dir)


def compact(data_dir: Path) -> str:
    """Rewrites the database where something was deleted since the last time."""
    return EMPTIED if erase(data_dir, rewrite=True) else NOT_EMPTIED


def _forget_rows(store: Store, user: str) -> None:
    while store.deletion.step(user):
        pass
