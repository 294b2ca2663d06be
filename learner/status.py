"""What is served, what was learned from, what waits. Reads the store alone: no torch."""

from pathlib import Path
from typing import Any

from server.errors import NotFoundError
from server.store import FeedbackStore


def status(data_dir: Path) -> dict[str, Any]:
    """A record for `--json`; `lines` are (name, sentence) to show."""
    if not (data_dir / "prefloop.db").exists():
        return {"lines": [("served", f"nothing: there is no data in {str(data_dir)!r} yet")]}
    store = FeedbackStore.open(data_dir)
    try:
        return _status(store)
    finally:
        store.close()


def _status(store: FeedbackStore) -> dict[str, Any]:
    try:
        active = store.registry.active_policy()
    except NotFoundError:
        return {"lines": [("served", "nothing: no server has started here yet")]}
    replicas = store.registry.replicas()
    learned = store.registry.last_learned()
    votes = store.count_votes()
    waiting = store.count_votes(after=learned.watermark) if learned else votes
    served = f"{active.version} should be served; " + (
        ", ".join(f"{r.id} has {r.loaded_version}{f' ({r.error})' if r.error else ''}" for r in replicas)
        or "no server is running"
    )
    lines = [("served", served)]
    if learned:
        used = sum(learned.metrics.get("votes", {}).get(kind, 0) for kind in ("choices", "thumbs", "corrections"))
        lines.append(("learned from", f"{used} votes in {learned.id} ({learned.state}): {learned.reason}"))
    else:
        lines.append(("learned from", "nothing yet"))
    running = store.registry.running_round()
    if running:
        lines.append(
            ("at work", f"{running.id}, done: {running.stage}; `learner run-once` goes on with it if it was stopped")
        )
    lines.append(("waiting", f"{waiting} of {votes} votes are new since then" if learned else f"{waiting} votes"))
    return {
        "active_version": active.version,
        "replicas": [{"id": r.id, "loaded_version": r.loaded_version, "error": r.error} for r in replicas],
        "last_round": learned
        and {"id": learned.id, "state": learned.state, "reason": learned.reason, "metrics": learned.metrics},
        "running_round": running and {"id": running.id, "stage": running.stage},
        "votes": votes,
        "new_votes": waiting,
        "lines": lines,
    }
