"""The served version, the last round, and how many votes are new. Reads only the store: no torch."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from learner.ops.slot_order import order_warnings
from learner.round.sft.due import after_last
from server.shared.errors import NotFoundError
from server.store.learning.records import Learner, Round
from server.store.store import Store


def status(data_dir: Path, ab_test_voters: int, ab_test_user_votes: int) -> dict[str, Any]:
    """A record for `--json`; `lines` are (name, sentence) to show."""
    if not Store.exists(data_dir):
        return {"lines": [("served", f"nothing: there is no data in {str(data_dir)!r} yet")]}
    store = Store.open(data_dir)
    try:
        return _status(store, ab_test_voters, ab_test_user_votes)
    finally:
        store.close()


def _side_by_side(store: Store, ab_test_voters: int, ab_test_user_votes: int) -> Iterator[tuple[str, str]]:
    """How users judge the active version and the one before it."""
    duel = store.lineage.duel(ab_test_voters, ab_test_user_votes)
    if duel and (duel.wins or duel.losses or duel.draws):
        evidence = f"evidence that it is better {duel.won:.3g}, worse {duel.lost:.3g}"
        yield "side by side", f"{duel.version} has {duel}; {evidence}"
    active, before = store.policies.active().version, store.policies.previous_version()
    rates = {version: store.lineage.thumb_rate(version) for version in (active, before) if version}
    if any(thumbs for _, thumbs in rates.values()):
        counts = "; ".join(f"{version}: {up} of {thumbs} up" for version, (up, thumbs) in rates.items())
        yield "thumbs", f"{counts}. From different users and questions, not blind: a hint, not a test"


def _canary(store: Store) -> Iterator[tuple[str, str]]:
    """How a version that waits for people's choices stands."""
    if canary := store.canaries.waiting():
        result = store.canaries.result(canary)
        needed = f"{canary.evidence:g} decides, at most {canary.max_votes} choices, until {_when(canary.expire_time)}"
        yield "canary", f"{canary.version} waits against {canary.opponent_version}: {result}; {needed}"


def _learner(learner: Learner) -> Iterator[tuple[str, str]]:
    """Which learner listens for requests, and the outcome of the last one."""
    if not learner.listening:
        yield "listening", "no learner; `learner schedule` starts rounds by the clock or on request"
    elif learner.next_time is None:
        yield "listening", "a learner that starts rounds on request"
    else:
        yield "listening", f"a learner; its next round starts {_when(learner.next_time)}"
    if request := learner.request:
        yield "requested", f"{_when(request.create_time)}: {request.outcome or 'not finished yet'}"


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M}"


def _learned(learned: Round | None, quarantined: list[str], votes: int) -> Iterator[tuple[str, str]]:
    if learned:
        used = learned.metrics.votes.used if learned.metrics.votes else 0
        yield "learned from", f"{used} votes in {learned.id} ({learned.state}): {learned.reason}"
        if (signal := learned.metrics.signal) and (missing := signal.missing(votes)):
            yield "needs", f"about {missing} more votes as clear as those so far"
    else:
        yield "learned from", "nothing yet"
    if quarantined or (learned and learned.quarantined):
        yield "quarantine", _left_out(quarantined, learned)


def _demonstrations(store: Store) -> Iterator[tuple[str, str]]:
    """What was learned from demonstrations and corrections last, and how many wait, if there are any."""
    if last := store.rounds.last_fine_tuned():
        yield "imitated", f"in {last.id} ({last.state}): {last.reason}"
    if waiting := sum(store.snapshots.count_examples(after_last(store)).values()):
        yield "to imitate", f"{waiting} new demonstrations and corrections, for `learner sft`"


def _moves(store: Store) -> Iterator[tuple[str, str]]:
    for move in store.lineage.moves(3):
        if move.previous_version:
            what = f"{move.version} for {move.previous_version} by {move.actor}: {move.reason}"
            yield move.action, f"{_when(move.create_time)}, {what}"


def _left_out(quarantined: list[str], learned: Round | None) -> str:
    now = f"{', '.join(quarantined) or 'nobody'} (the next round leaves their votes out)"
    if learned is None:
        return now
    votes = learned.metrics.votes
    return f"{now}; {votes.quarantined if votes else 0} votes were left out of {learned.id}"


def _status(store: Store, ab_test_voters: int, ab_test_user_votes: int) -> dict[str, Any]:
    try:
        active = store.policies.active()
    except NotFoundError:
        return {"lines": [("served", "nothing: no server has started here yet")]}
    replicas = store.replicas.alive()
    learned, running, learner = store.rounds.last_learned(), store.rounds.running(), store.learner()
    votes, quarantined = store.snapshots.count_votes(), store.quarantine.current()
    warnings = list(order_warnings(store.lineage.slot_order()))
    served = f"{active.version} should be served; " + (
        ", ".join(f"{r.id} has {r.loaded_version}{f' ({r.error})' if r.error else ''}" for r in replicas)
        or "no server is running"
    )
    lines = [("served", served), *_learned(learned, list(quarantined), votes)]
    lines += [("warning", warning) for warning in warnings]
    lines += [*_canary(store), *_side_by_side(store, ab_test_voters, ab_test_user_votes)]
    lines += list(_moves(store))
    if running:
        what = f"{running.id}, done: {running.stage}; `learner run-once` resumes it if it was stopped"
        lines.append(("running", what))
    lines += list(_learner(learner))
    since = f" of {votes} votes are new since then" if learned else " votes"
    lines.append(("new votes", f"{learner.new_votes}{since}"))
    lines += list(_demonstrations(store))
    return {
        "active_version": active.version,
        "replicas": [{"id": r.id, "loaded_version": r.loaded_version, "error": r.error} for r in replicas],
        "last_round": learned
        and {"id": learned.id, "state": learned.state, "reason": learned.reason, "metrics": learned.metrics.to_json()},
        "running_round": running and {"id": running.id, "stage": running.stage},
        "listening": learner.listening,
        "next_time": learner.next_time,
        "request": learner.request and asdict(learner.request),
        "votes": votes,
        "new_votes": learner.new_votes,
        "quarantined": list(quarantined),
        "warnings": warnings,
        "lines": lines,
    }
