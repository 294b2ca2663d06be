"""The template environment, and the functions that templates use to describe a turn."""

from datetime import UTC
from pathlib import Path

import jinja2
from google.protobuf.timestamp_pb2 import Timestamp
from markupsafe import Markup
from prefloop.v1 import chat_pb2, feedback_pb2, policy_pb2
from prefloop.v1.chat_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_STOP_SEQUENCE,
    FINISH_REASON_UNSPECIFIED,
    Response,
    Turn,
)
from prefloop.v1.feedback_pb2 import Feedback, FeedbackKind

from clients.web.markup import safe_html

ENDINGS = {
    FINISH_REASON_LENGTH: "cut at the length limit",
    FINISH_REASON_CANCELLED: "stopped",
    FINISH_REASON_ERROR: "cut off by an error",
}
WHOLE = (FINISH_REASON_STOP, FINISH_REASON_STOP_SEQUENCE, FINISH_REASON_LENGTH)


def environment() -> jinja2.Environment:
    """The templates, with the API's constants under the names of its packages."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals |= {"chat": chat_pb2, "votes": feedback_pb2, "policies": policy_pb2}
    env.globals |= {"answers": answers, "turn_id": turn_id, "footer": footer, "vote": vote}
    env.filters |= {"markdown": safe_html, "when": when}
    env.tests |= {"unfinished": unfinished, "cut": cut, "choosable": choosable}
    return env


def answers(turn: Turn) -> list[tuple[str, Response]]:
    """A turn's answers with their displayed names: A and B, or one without a name."""
    if turn.HasField("comparison"):
        return [("A", turn.comparison.a), ("B", turn.comparison.b)]
    if turn.HasField("given_answer"):
        # Of another service: it has no id, and so no votes.
        return [("", Response(text=turn.given_answer, finish_reason=FINISH_REASON_STOP))]
    return [("", turn.response)]


def unfinished(turn: Turn) -> bool:
    return any(answer.finish_reason == FINISH_REASON_UNSPECIFIED for _, answer in answers(turn))


def cut(turn: Turn) -> bool:
    """Whether an answer was stopped or cut off by an error."""
    return any(answer.finish_reason in (FINISH_REASON_CANCELLED, FINISH_REASON_ERROR) for _, answer in answers(turn))


def choosable(turn: Turn) -> bool:
    """Whether there are two complete answers to choose from."""
    return turn.HasField("comparison") and all(answer.finish_reason in WHOLE for _, answer in answers(turn))


def vote(answer: Response, kind: FeedbackKind.ValueType) -> Feedback | None:
    """The user's current thumb on an answer, or their correction."""
    return next((found for found in answer.feedback if found.kind == kind), None)


def turn_id(turn: Turn) -> str:
    """The id of a turn's HTML element."""
    return "turn-" + (turn.comparison.comparison_id or turn.response.response_id or turn.turn_id)


def footer(answer: Response) -> str:
    """An answer's metadata, as in "v0001 -> v0002 · 60 tokens · stopped", without what is not disclosed yet."""
    versions = " -> ".join(dict.fromkeys(span.policy_version for span in answer.spans))
    count = answer.usage.completion_tokens
    tokens = f"{count} token{'s' if count > 1 else ''}" if count else ""
    return " · ".join(filter(None, [versions, tokens, ENDINGS.get(answer.finish_reason, "")]))


def when(time: Timestamp) -> Markup:
    """A time in UTC, which the page's script converts to the user's time zone."""
    moment = time.ToDatetime(UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        moment.isoformat(timespec="seconds"), moment.strftime("%Y-%m-%d %H:%M UTC")
    )
