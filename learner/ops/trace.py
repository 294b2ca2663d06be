"""Lineage both ways: what made a version, and which versions a vote went into. Reads only the store: no torch.

A round learns from all votes from scratch, so a version depends on the votes of its own round. If that round started
from the active policy, it also depends on the votes of its ancestors.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from server.shared.errors import NotFoundError
from server.shared.stored_round import start_from
from server.store.chats.records import FeedbackEvent
from server.store.learning.records import PolicyVersion, Round
from server.store.store import Store


@dataclass(frozen=True)
class Trace:
    """`record` for programs, `lines` for people."""

    record: dict[str, Any]
    lines: list[str]


def trace_version(data_dir: Path, version: str) -> Trace:
    """Which votes and which reward model made a version. Raises NotFoundError."""
    with closing(Store.open(data_dir)) as store:
        policy = store.policies.get(version)
        moves = [move for move in reversed(store.lineage.moves()) if version in (move.version, move.previous_version)]
        made = [_made(store, store.policies.get(ancestor)) for ancestor in store.lineage.ancestors(version)]
    record: dict[str, Any] = {
        "version": version,
        "state": policy.state,
        "kind": policy.kind,
        "parent_version": policy.parent_version,
        "reference_version": policy.reference_version,
        "pruned": policy.prune_time is not None,
        "reason": policy.reason,
        "made_by": [step for step in made if step],
        "moves": [vars(move) for move in moves],
    }
    gone = ", its weights pruned" if policy.prune_time else ""
    lines = [f"{version}  {policy.state}{gone}, {policy.kind} weights, reference {policy.reference_version}"]
    if policy.reason:
        lines.append(f"       {policy.reason}")
    for step in record["made_by"]:
        lines += _made_lines(step)
    if not record["made_by"]:
        lines.append("       made by no round, from no votes")
    for move in moves:
        what = f"to {move.version}" + (f" from {move.previous_version}" if move.previous_version else "")
        lines.append(f"       {_time(move.create_time)}  {move.action} {what} by {move.actor}: {move.reason}")
    return Trace(record, lines)


def trace_vote(data_dir: Path, feedback_id: str) -> Trace:
    """Which rounds learned from a vote, and which versions they made. Raises NotFoundError."""
    with closing(Store.open(data_dir)) as store:
        events = store.lineage.events(feedback_id)
        if not events:
            raise NotFoundError("feedback", feedback_id)
        sides = store.lineage.rounds_of(feedback_id)
        rounds = [store.rounds.get(round_id) for round_id in sides]
        carriers = {round_.id: store.lineage.carriers([round_.id]) for round_ in rounds}
    carried: list[dict[str, Any]] = [
        {
            "round_id": round_.id,
            "side": sides[round_.id],
            "saw": seen.value if (seen := _seen(events, round_)) else None,
            "reward_model_version": round_.reward_model_version,
            "versions": carriers[round_.id],
        }
        for round_ in rounds
    ]
    record = {"feedback_id": feedback_id, "events": [vars(event) for event in events], "rounds": carried}
    first = events[0]
    who = first.user or "a deleted user"
    lines = [f"{feedback_id}  {first.kind} of {who} on {first.comparison_id or first.response_id or 'its own'}"]
    for event in events:
        content = "" if event.action != "submit" else f" {'(deleted)' if event.value is None else event.value[:60]}"
        lines.append(f"       {_time(event.create_time)}  {event.action}{content}")
    for step in carried:
        model = (
            f"{'trained' if step['side'] == 'train' else 'judged'} {step['reward_model_version'] or 'no reward model'}"
        )
        versions = ", ".join(f"{version} ({state})" for version, state in step["versions"].items()) or "no version"
        lines.append(f"       {step['round_id']}  {model}: {versions}")
    if not carried:
        lines.append("       used by no round")
    return Trace(record, lines)


def _made(store: Store, policy: PolicyVersion) -> dict[str, Any] | None:
    if policy.round_id is None:
        return None
    round_ = store.rounds.get(policy.round_id)
    sides = store.lineage.round_votes(round_.id)
    return {
        "version": policy.version,
        "round_id": round_.id,
        "create_time": round_.create_time,
        "start_from": start_from(round_.settings),
        "reward_model_version": policy.reward_model_version,
        "watermark": round_.watermark,
        "votes": {side: sorted(vote for vote, s in sides.items() if s == side) for side in ("train", "judge")},
        "since": store.lineage.fate(round_.id, round_.watermark),
    }


def _made_lines(step: dict[str, Any]) -> Iterator[str]:
    votes, since = step["votes"], step["since"]
    learned_by = step["reward_model_version"] or "by imitation"
    what = f"made {step['version']} from the {step['start_from']}, {learned_by}"
    yield (
        f"       {_time(step['create_time'])}  {step['round_id']} {what} from {len(votes['train'])} votes; "
        f"{len(votes['judge'])} judged"
    )
    changes = ", ".join(f"{count} {change}" for change, count in since.items() if count)
    if changes:
        yield f"       of these votes, since then: {changes}"


def _seen(events: list[FeedbackEvent], round_: Round) -> FeedbackEvent | None:
    """The event whose value the round learned from."""
    return next((event for event in reversed(events) if event.seq <= round_.watermark), None)


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M}"
