"""Validation rules for every request field, as a table. InvalidArgumentError names the invalid fields."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2, policy_pb2, review_pb2

from server.settings import ServerSettings
from server.shared.errors import InvalidArgumentError

MAX_ID_CHARS = 128
MAX_PAGE_SIZE = 200
MAX_DEMONSTRATION_MESSAGES = 64
# A demonstration may be as long as this many of the longest messages.
DEMONSTRATION_MESSAGES = 4
MAX_DAYS = 366
MAX_HISTORY_MESSAGES = 1000
MAX_STOP_SEQUENCES = 4
MAX_STOP_CHARS = 100


# Returns what is wrong with a value, as the end of "FIELD ...", or None.
Rule = Callable[[Any], str | None]


@dataclass(frozen=True)
class Field:
    """The rule of one field of requests for which `when` is true; a field with presence is checked only if it is
    set."""

    name: str
    rule: Rule
    when: Callable[[Any], bool] = lambda request: True


def text(max_chars: int, *, empty: bool = False) -> Rule:
    def rule(value: str) -> str | None:
        if not empty and not value.strip():
            return "must not be empty"
        return f"must have at most {max_chars} characters, not {len(value)}" if len(value) > max_chars else None

    return rule


def identifier(*, empty: bool = False) -> Rule:
    return text(MAX_ID_CHARS, empty=empty)


def between(low: float, high: float) -> Rule:
    def rule(value: float) -> str | None:
        return None if math.isfinite(value) and low <= value <= high else f"must be {low:g} to {high:g}, not {value:g}"

    return rule


def one_of(allowed: Any) -> Rule:
    """A named value of an enum other than zero."""

    named, names = set(allowed.values()) - {0}, ", ".join(allowed.keys()[1:])

    def rule(value: int) -> str | None:
        return None if value in named else f"must be one of {names}"

    return rule


def blank(why: str) -> Rule:
    return lambda value: f"must be empty: {why}" if value else None


def unset(why: str) -> Rule:
    return lambda value: f"must not be set: {why}"


def stop_sequences(stop: Any) -> str | None:
    if len(stop) > MAX_STOP_SEQUENCES:
        return f"must be at most {MAX_STOP_SEQUENCES} sequences, not {len(stop)}"
    if not all(1 <= len(sequence) <= MAX_STOP_CHARS for sequence in stop):
        return f"must each have 1 to {MAX_STOP_CHARS} characters"
    return None


def own_history(max_chars: int) -> Rule:
    """A system prompt, if any, then messages of the user and the assistant in turn, the user's last."""
    system, user, assistant = feedback_pb2.ROLE_SYSTEM, feedback_pb2.ROLE_USER, feedback_pb2.ROLE_ASSISTANT

    def rule(messages: Any) -> str | None:
        roles = [message.role for message in messages]
        if len(roles) > MAX_HISTORY_MESSAGES:
            return f"must be at most {MAX_HISTORY_MESSAGES} messages, not {len(roles)}"
        if roles[-1] != user:
            return "must end with the user's message"
        turns = roles[1:] if roles[0] == system else roles
        if turns[::-1] != [user if place % 2 == 0 else assistant for place in range(len(turns))]:
            return "must be the user's and the assistant's in turn, after a system prompt if there is one"
        problems = (text(max_chars, empty=message.role != user)(message.content) for message in messages)
        problem = next(filter(None, problems), None)
        return f"must each be valid: content {problem}" if problem else None

    return rule


def answered_history(max_chars: int) -> Rule:
    """The same, and then the assistant's message."""

    def rule(messages: Any) -> str | None:
        if len(messages) < 2 or messages[-1].role != feedback_pb2.ROLE_ASSISTANT:
            return "must end with the assistant's message after the user's"
        return own_history(max_chars)(messages[:-1]) or text(max_chars, empty=True)(messages[-1].content)

    return rule


def demonstration(max_chars: int) -> Rule:
    """A conversation with roles and text that ends with the assistant's message."""

    def rule(messages: Any) -> str | None:
        if not 2 <= len(messages) <= MAX_DEMONSTRATION_MESSAGES:
            return f"must be 2 to {MAX_DEMONSTRATION_MESSAGES} messages, not {len(messages)}"
        if any(message.role not in feedback_pb2.Role.values()[1:] for message in messages):
            return "must each have a role"
        if messages[-1].role != feedback_pb2.ROLE_ASSISTANT:
            return "must end with the assistant's message"
        problems = (text(max_chars)(message.content) for message in messages)
        if problem := next(filter(None, problems), None):
            return f"must each be valid: content {problem}"
        total = sum(len(message.content) for message in messages)
        most = DEMONSTRATION_MESSAGES * max_chars
        return f"must have at most {most} characters together, not {total}" if total > most else None

    return rule


def rules(settings: ServerSettings) -> dict[type[Message], list[Field]]:
    """Map each request type to the rules of its fields."""
    page = [Field("page_size", between(0, MAX_PAGE_SIZE)), Field("page_token", text(512, empty=True))]
    return {**_chat_rules(settings, page), **_feedback_rules(settings, page), **_operators_rules(settings, page)}


def _chat_rules(settings: ServerSettings, page: list[Field]) -> dict[type[Message], list[Field]]:
    request_id = Field("request_id", identifier(empty=True))
    maybe_conversation, conversation = (Field("conversation_id", identifier(empty=empty)) for empty in (True, False))
    said = [
        maybe_conversation,
        Field("message", text(settings.max_message_chars), lambda request: not request.messages),
        Field("system", text(settings.max_message_chars, empty=True)),
        *_own_history(settings.max_message_chars),
    ]
    max_tokens = Field("sampling.max_tokens", between(1, settings.max_tokens))
    # vLLM accepts seeds as signed 64-bit numbers.
    seed = Field("sampling.seed", between(0, 2**63 - 1))
    stop = Field("sampling.stop", stop_sequences)
    version = Field("policy_version", identifier(empty=True))
    temperature = Field("sampling.temperature", between(0, 2))
    server_temperature = Field("sampling.temperature", unset("the server chooses Compare's two temperatures"))
    return {
        chat_pb2.ChatRequest: [*said, temperature, max_tokens, seed, stop, request_id, version],
        chat_pb2.CompareRequest: [*said, server_temperature, max_tokens, seed, stop, request_id],
        chat_pb2.FindResponseRequest: [
            Field("messages", answered_history(settings.max_message_chars)),
            *(field for field in said if field.name == "system"),
        ],
        chat_pb2.ListVersionsRequest: [],
        chat_pb2.GetConversationRequest: [conversation, *page],
        chat_pb2.ListConversationsRequest: page,
        chat_pb2.DeleteConversationRequest: [conversation],
    }


def _own_history(max_chars: int) -> list[Field]:
    """Rules of `messages`, and of the fields that they replace."""
    system = feedback_pb2.ROLE_SYSTEM
    return [
        Field("messages", own_history(max_chars), lambda request: request.messages),
        Field("message", blank("messages has the message"), lambda request: request.messages),
        Field("conversation_id", blank("messages has the conversation"), lambda request: request.messages),
        Field(
            "system",
            unset("messages has a system prompt"),
            lambda request: request.messages and request.messages[0].role == system,
        ),
    ]


def _feedback_rules(settings: ServerSettings, page: list[Field]) -> dict[type[Message], list[Field]]:
    comment = Field("comment", text(settings.max_message_chars, empty=True))
    request_id, response = Field("request_id", identifier(empty=True)), Field("response_id", identifier())
    return {
        feedback_pb2.SubmitThumbRequest: [
            response, Field("thumb", one_of(feedback_pb2.Thumb)), comment, request_id,
        ],
        feedback_pb2.SubmitChoiceRequest: [
            Field("comparison_id", identifier()), Field("choice", one_of(feedback_pb2.Choice)), comment, request_id,
        ],
        feedback_pb2.SubmitPairChoiceRequest: [
            Field("response_id_a", identifier()), Field("response_id_b", identifier()),
            Field("choice", one_of(feedback_pb2.Choice)), comment, request_id,
        ],
        feedback_pb2.SubmitCorrectionRequest: [
            response, Field("text", text(settings.max_message_chars)), request_id,
        ],
        feedback_pb2.SubmitDemonstrationRequest: [
            Field("messages", demonstration(settings.max_message_chars)), request_id,
        ],
        feedback_pb2.RetractFeedbackRequest: [Field("feedback_id", identifier())],
        feedback_pb2.ListFeedbackRequest: page,
        review_pb2.GetReviewRequest: [],
        review_pb2.SkipReviewRequest: [Field("comparison_id", identifier())],
    }  # fmt: skip


def _operators_rules(settings: ServerSettings, page: list[Field]) -> dict[type[Message], list[Field]]:
    """Rules for requests about users, versions, rounds and health."""
    reason = Field("reason", text(settings.max_message_chars, empty=True))
    user, expected = Field("user", identifier(empty=True)), Field("expected_active_version", identifier())
    return {
        account_pb2.GetCallerRequest: [],
        account_pb2.ForgetUserRequest: [user],
        account_pb2.ExportUserRequest: [user],
        health_pb2.HealthCheckRequest: [Field("service", identifier(empty=True))],
        health_pb2.HealthListRequest: [],  # type: ignore[attr-defined]
        policy_pb2.GetActivePolicyRequest: [],
        policy_pb2.ListPoliciesRequest: page,
        policy_pb2.ActivatePolicyRequest: [Field("version", identifier()), expected, reason],
        policy_pb2.RollbackPolicyRequest: [Field("version", identifier(empty=True)), expected, reason],
        policy_pb2.ListRoundsRequest: page,
        policy_pb2.ListRoundSamplesRequest: [Field("round_id", identifier()), *page],
        policy_pb2.CountVotesRequest: [Field("days", between(0, MAX_DAYS))],
        policy_pb2.GetLearnerRequest: [],
        policy_pb2.RequestRoundRequest: [],
    }


def validator(settings: ServerSettings) -> Callable[[Message], None]:
    """A function that raises InvalidArgumentError with every invalid field of a request."""
    table = rules(settings)

    def validate(request: Message) -> None:
        violations = [(field.name, problem) for field in table[type(request)] if (problem := _problem(field, request))]
        if violations:
            (name, problem), *others = violations
            raise InvalidArgumentError(name, problem, others=others)

    return validate


def _problem(field: Field, request: Message) -> str | None:
    if not field.when(request):
        return None
    *parents, name = field.name.split(".")
    holder: Any = request
    for parent in parents:
        holder = getattr(holder, parent)
    if holder.DESCRIPTOR.fields_by_name[name].has_presence and not holder.HasField(name):
        return None
    problem = field.rule(getattr(holder, name))
    return f"{field.name} {problem}." if problem else None
