"""Converts domain records to protobuf messages and page tokens."""

import base64
import json
import math
from typing import Any

from google.protobuf import json_format, struct_pb2, timestamp_pb2
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2, policy_pb2

from server.shared.errors import InvalidArgumentError
from server.store.chats import records
from server.store.chats.machine_choices import SaidOfUser
from server.store.e_value import AbTestResult, CanaryResult
from server.store.files.round_samples import RoundSample
from server.store.keys import Key
from server.store.learning import records as learning

DEFAULT_PAGE_SIZE = 50

FINISH_REASONS = {
    "stop": chat_pb2.FINISH_REASON_STOP,
    "stop_sequence": chat_pb2.FINISH_REASON_STOP_SEQUENCE,
    "length": chat_pb2.FINISH_REASON_LENGTH,
    "cancelled": chat_pb2.FINISH_REASON_CANCELLED,
    "error": chat_pb2.FINISH_REASON_ERROR,
}
SLOTS = {"A": chat_pb2.SLOT_A, "B": chat_pb2.SLOT_B}
CHOICES: dict[records.Choice, feedback_pb2.Choice.ValueType] = {
    "A": feedback_pb2.CHOICE_A,
    "B": feedback_pb2.CHOICE_B,
    "TIE": feedback_pb2.CHOICE_TIE,
    "BOTH_BAD": feedback_pb2.CHOICE_BOTH_BAD,
}
CHOICE_OF = {value: name for name, value in CHOICES.items()}
ROLES = {
    feedback_pb2.ROLE_SYSTEM: "system",
    feedback_pb2.ROLE_USER: "user",
    feedback_pb2.ROLE_ASSISTANT: "assistant",
}
ROLE_OF = {name: role for role, name in ROLES.items()}


def timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    """Seconds since 1970, to the microsecond."""
    message = timestamp_pb2.Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def struct(values: dict[str, Any]) -> struct_pb2.Struct:
    return json_format.ParseDict(values, struct_pb2.Struct())


def page_token(key: list[Any]) -> str:
    """An opaque token for the place after `key`."""
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def page_key(token: str, types: tuple[type, ...]) -> list[Any] | None:
    """The key of a token that `page_token` made; None for the first page. Raises InvalidArgumentError."""
    if not token:
        return None
    try:
        key = json.loads(base64.urlsafe_b64decode(token))
        if [type(part) for part in key] != list(types) or not all(_sound(part) for part in key):
            raise ValueError(token)
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError("page_token", "page_token was not issued by this RPC.") from error
    return list(key)


def _sound(part: Any) -> bool:
    """Whether SQLite accepts it: 64-bit integers, finite floats, and text that can be encoded."""
    if isinstance(part, str):
        part.encode()  # Raises UnicodeEncodeError, a ValueError.
        return True
    return -(2**63) <= part < 2**63 if isinstance(part, int) else math.isfinite(part)


def usage(prompt_token_ids: list[int], token_ids: list[int]) -> chat_pb2.Usage:
    return chat_pb2.Usage(prompt_tokens=len(prompt_token_ids), completion_tokens=len(token_ids))


def feedback(record: records.Feedback) -> feedback_pb2.Feedback:
    message = feedback_pb2.Feedback(
        feedback_id=record.id,
        kind=feedback_pb2.FeedbackKind.Value(f"FEEDBACK_KIND_{record.kind.upper()}"),
        comment=record.comment,
        create_time=timestamp(record.create_time),
    )
    if record.response_id:
        message.response_id = record.response_id
    if record.comparison_id:
        message.comparison_id = record.comparison_id
    match record.kind:
        case "thumb":
            message.thumb = feedback_pb2.Thumb.Value(f"THUMB_{record.value}")
        case "choice":
            message.choice = feedback_pb2.Choice.Value(f"CHOICE_{record.value}")
        case "correction":
            message.correction = record.value
        case "demonstration":
            for part in json.loads(record.value):
                role = feedback_pb2.Role.Value(f"ROLE_{part['role'].upper()}")
                message.demonstration.messages.add(role=role, content=part["content"])
    return message


def response(record: records.Response, votes: list[records.Feedback], *, blind: bool = False) -> chat_pb2.Response:
    """The message of an answer. `blind` leaves out what would tell two compared answers apart."""
    message = chat_pb2.Response(
        response_id=record.id,
        text=record.text,
        finish_reason=FINISH_REASONS.get(record.finish_reason or "", chat_pb2.FINISH_REASON_UNSPECIFIED),
        usage=usage(record.prompt_token_ids, record.token_ids),
        create_time=timestamp(record.create_time),
        feedback=[feedback(vote) for vote in votes if vote.response_id == record.id],
    )
    if not blind:
        message.temperature = record.temperature
        message.spans.extend(spans(record.spans))
    return message


def spans(labelled: list[records.Span]) -> list[chat_pb2.VersionSpan]:
    return [
        chat_pb2.VersionSpan(start=one.start, end=one.end, policy_version=one.policy_version, stale_kv=one.stale_kv)
        for one in labelled
    ]


def comparison(record: records.Comparison, votes: list[records.Feedback]) -> chat_pb2.Comparison:
    blind = record.state != "chosen"
    vote = next((vote for vote in votes if vote.comparison_id == record.id), None)
    return chat_pb2.Comparison(
        comparison_id=record.id,
        state=chat_pb2.ComparisonState.Value(f"COMPARISON_STATE_{record.state.upper()}"),
        a=response(record.a, votes, blind=blind),
        b=response(record.b, votes, blind=blind),
        continued_with=SLOTS.get(record.continued_with or "", chat_pb2.SLOT_UNSPECIFIED),
        feedback=feedback(vote) if vote else None,
    )


def turn(record: records.Turn, votes: list[records.Feedback]) -> chat_pb2.Turn:
    message = chat_pb2.Turn(
        message=record.message,
        create_time=timestamp(record.create_time),
        dropped=record.dropped,
        turn_id=_turn_id(record.seq),
        parent_turn_id=_turn_id(record.parent),
        response=response(record.response, votes) if record.response else None,
        comparison=comparison(record.comparison, votes) if record.comparison else None,
    )
    if record.given_answer is not None:
        message.given_answer = record.given_answer
    return message


def _turn_id(seq: int | None) -> str:
    return "" if seq is None else f"turn_{seq}"


def conversation(
    record: records.Conversation, turns: list[records.Turn] | None = None, votes: list[records.Feedback] | None = None
) -> chat_pb2.Conversation:
    return chat_pb2.Conversation(
        conversation_id=record.id,
        title=record.title,
        create_time=timestamp(record.create_time),
        update_time=timestamp(record.update_time),
        turns=[turn(part, votes or []) for part in turns or []],
        system=record.system,
    )


def policy(record: learning.PolicyVersion) -> policy_pb2.Policy:
    return policy_pb2.Policy(
        version=record.version,
        state=policy_pb2.PolicyState.Value(f"POLICY_STATE_{record.state.upper()}"),
        parent_version=record.parent_version or "",
        round_id=record.round_id or "",
        reward_model_version=record.reward_model_version or "",
        metrics=struct(record.metrics),
        create_time=timestamp(record.create_time),
        activate_time=timestamp(record.activate_time) if record.activate_time else None,
        reason=record.reason,
        reference_version=record.reference_version,
        prune_time=timestamp(record.prune_time) if record.prune_time else None,
    )


def replica(record: learning.Replica) -> policy_pb2.Replica:
    return policy_pb2.Replica(
        replica_id=record.id,
        loaded_version=record.loaded_version,
        error=record.error,
        heartbeat_time=timestamp(record.heartbeat_time),
    )


def round_(record: learning.Round) -> policy_pb2.Round:
    return policy_pb2.Round(
        round_id=record.id,
        state=policy_pb2.RoundState.Value(f"ROUND_STATE_{record.state.upper()}"),
        stage=record.stage,
        policy_version=record.policy_version or "",
        reward_model_version=record.reward_model_version or "",
        metrics=struct(record.metrics.to_json()),
        reason=record.reason,
        create_time=timestamp(record.create_time),
        finish_time=timestamp(record.finish_time) if record.finish_time else None,
        kind=policy_pb2.RoundKind.Value(f"ROUND_KIND_{record.kind.upper()}"),
    )


def duel(record: AbTestResult) -> policy_pb2.Duel:
    return policy_pb2.Duel(
        version=record.version,
        opponent_version=record.opponent,
        wins=record.wins,
        losses=record.losses,
        draws=record.draws,
        evidence_better=record.won,
        evidence_worse=record.lost,
        few_voters=record.few_voters,
    )


def canary(record: learning.Canary, result: CanaryResult) -> policy_pb2.Canary:
    return policy_pb2.Canary(
        version=record.version,
        opponent_version=record.opponent_version,
        round_id=record.round_id,
        votes=result.votes,
        max_votes=record.max_votes,
        evidence_better=result.better,
        evidence_worse=result.worse,
        evidence_needed=record.evidence,
        create_time=timestamp(record.create_time),
        expire_time=timestamp(record.expire_time),
    )


def sample(record: RoundSample) -> policy_pb2.RoundSample:
    return policy_pb2.RoundSample(prompt=record.prompt, before=record.before, after=record.after)


def vote_count(record: records.VoteCount) -> policy_pb2.VoteCount:
    kind = feedback_pb2.FeedbackKind.Value(f"FEEDBACK_KIND_{record.kind.upper()}")
    return policy_pb2.VoteCount(date=record.date, kind=kind, votes=record.votes)


def learner(record: learning.Learner) -> policy_pb2.Learner:
    running, request = record.running, record.request
    return policy_pb2.Learner(
        listening=record.listening,
        running_round_id=running.id if running else "",
        stage=running.stage if running else "",
        next_round_time=timestamp(record.next_time) if record.next_time else None,
        new_votes=record.new_votes,
        request_time=timestamp(request.create_time) if request else None,
        end_time=timestamp(request.end_time) if request and request.end_time else None,
        outcome=request.outcome if request else "",
    )


def key(record: Key) -> account_pb2.Key:
    return account_pb2.Key(
        key_id=record.id,
        role=record.role,
        create_time=timestamp(record.create_time),
        revoke_time=timestamp(record.revoke_time) if record.revoke_time else None,
    )


def repeated_request(record: records.RepeatedRequest) -> account_pb2.RepeatedRequest:
    return account_pb2.RepeatedRequest(
        rpc=record.rpc, request_id=record.request_id, create_time=timestamp(record.create_time)
    )


def policy_move(record: learning.PointerEvent) -> account_pb2.PolicyMove:
    return account_pb2.PolicyMove(
        version=record.version, action=record.action, reason=record.reason, create_time=timestamp(record.create_time)
    )


def quarantine(record: learning.QuarantineEvent) -> account_pb2.Quarantine:
    return account_pb2.Quarantine(action=record.action, reason=record.reason, create_time=timestamp(record.create_time))


def machine_choice(record: SaidOfUser) -> account_pb2.MachineChoice:
    return account_pb2.MachineChoice(
        comparison_id=record.comparison_id,
        judge=record.judge,
        shown=record.shown,
        swapped=record.swapped,
        create_time=timestamp(record.create_time),
    )
