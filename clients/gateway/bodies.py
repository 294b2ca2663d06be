"""The bodies of requests, read and checked."""

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from prefloop.v1 import feedback_pb2
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from clients.gateway.errors import GatewayError
from clients.gateway.fields import NEUTRAL, NEUTRAL_IN_MESSAGES, NEUTRAL_IN_STREAM_OPTIONS, SERVED, keep_served

MODEL = "prefloop"
ROLES = {
    "system": feedback_pb2.ROLE_SYSTEM,
    "developer": feedback_pb2.ROLE_SYSTEM,
    "user": feedback_pb2.ROLE_USER,
    "assistant": feedback_pb2.ROLE_ASSISTANT,
}
# Between texts that are joined.
BETWEEN = "\n\n"

# What the server's field can hold; its own limit is lower.
Tokens = Annotated[int, Field(ge=0, le=2**32 - 1)]

BodyT = TypeVar("BodyT", bound=BaseModel)


class Body(BaseModel):
    """A part of a request. Numbers are numbers, and not texts or booleans."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


class SaidMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = ""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    include_usage: bool = False


class OfEndUser(Body):
    """A request that may name an end user, under either name of the field."""

    user: str | None = None
    safety_identifier: str | None = None

    @property
    def end_user(self) -> str | None:
        return self.user if self.safety_identifier is None else self.safety_identifier


class ChatCompletion(OfEndUser):
    """A chat completion as far as it is served."""

    model: str
    messages: Annotated[list[SaidMessage], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=2)] = 1
    temperature: float | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: str | list[str] = []
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def version(self) -> str:
        """The version that the model names; empty for the one that serves."""
        return self.model.removeprefix(MODEL).removeprefix("@")

    @property
    def length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stop_sequences(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class FeedbackBody(OfEndUser):
    """Feedback on an answer or a comparison."""

    id: str | None = None
    # In place of the id: the messages, with the answer last.
    messages: list[SaidMessage] | None = None
    other_id: str | None = None
    value: bool | Literal["a", "b", "tie", "both_bad"] | None = None
    comment: str = ""
    correction: str | None = None


async def read_completion(request: Request) -> ChatCompletion:
    """The body of a chat completion. Raises GatewayError for what is invalid or not served."""
    given = keep_served(await _json(request), set(SERVED), NEUTRAL)
    if isinstance(said := given.get("messages"), list):
        given["messages"] = [_message(message, place) for place, message in enumerate(said)]
    if isinstance(options := given.get("stream_options"), dict):
        given["stream_options"] = keep_served(options, {"include_usage"}, NEUTRAL_IN_STREAM_OPTIONS, "stream_options.")
    body = _checked(ChatCompletion, given)
    if body.model != MODEL and not re.match(rf"{MODEL}@.", body.model):
        raise no_model(body.model)
    for older, newer in (("max_tokens", "max_completion_tokens"), ("user", "safety_identifier")):
        _check_same(body, older, newer)
    if body.n == 2:
        _check_comparison(body)
    return body


def no_model(name: str) -> GatewayError:
    sentence = f"There is no model {name!r}; {MODEL!r} is served."
    return GatewayError(404, sentence, param="model", code="model_not_found")


async def read_feedback(request: Request) -> FeedbackBody:
    """The body of feedback. Raises GatewayError if it is invalid."""
    given = await _json(request)
    if isinstance(said := given.get("messages"), list):
        given["messages"] = [_message(message, place) for place, message in enumerate(said)]
    body = _checked(FeedbackBody, {name: value for name, value in given.items() if value is not None})
    _check_same(body, "user", "safety_identifier")
    if (body.id is None) == (body.messages is None):
        raise GatewayError(400, "Feedback has the id of a completion, or the messages that end with it.", param="id")
    if body.value is None and body.correction is None:
        raise GatewayError(400, "Feedback has a value, a correction or both.", param="value")
    if body.other_id is not None and not isinstance(body.value, str):
        raise GatewayError(400, 'other_id goes with the value "a", "b", "tie" or "both_bad".', param="other_id")
    if body.value is None and body.comment:
        raise GatewayError(400, "A comment goes with a value.", param="comment")
    return body


def to_messages(said: list[SaidMessage]) -> list[feedback_pb2.Message]:
    """The server's messages: system prompts in one, and the user's and the assistant's in turn. Texts of one role that
    follow one another are joined. Raises GatewayError for a system prompt that comes later."""
    joined: list[feedback_pb2.Message] = []
    for place, message in enumerate(said):
        role = ROLES[message.role]
        if joined and joined[-1].role == role:
            joined[-1].content += BETWEEN + message.text
        elif joined and role == feedback_pb2.ROLE_SYSTEM:
            param = f"messages[{place}]"
            sentence = f"{param} is a system prompt after other messages; it is served only at the beginning."
            raise GatewayError(400, sentence, param=param, code="unsupported_value")
        else:
            joined.append(feedback_pb2.Message(role=role, content=message.text))
    return joined


async def _json(request: Request) -> dict[str, Any]:
    body = await request.body()
    try:
        # Python would accept other encodings, NaN and Infinity, and half of a surrogate pair.
        text = body.decode("utf-8")
        given = json.loads(text, parse_constant=_no_json)
        if "\\ud" in text.lower():
            json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise GatewayError(400, "The body is not valid JSON.") from error
    if not isinstance(given, dict):
        raise GatewayError(400, "The body must be a JSON object.")
    return given


def _no_json(constant: str) -> Any:
    raise ValueError(constant)


def _message(message: Any, place: int) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function"):
        param = f"messages[{place}].role"
        raise GatewayError(400, f"{param} {message['role']!r} is not served.", param=param, code="unsupported_value")
    for part in message["content"] if isinstance(message.get("content"), list) else ():
        if isinstance(part, dict) and part.get("type") != "text":
            param = f"messages[{place}].content"
            sentence = f"{param} has a part of the type {part.get('type')!r}; only text is served."
            raise GatewayError(400, sentence, param=param, code="unsupported_value")
    return keep_served(message, {"role", "content"}, NEUTRAL_IN_MESSAGES, f"messages[{place}].")


def _checked(kind: type[BodyT], given: dict[str, Any]) -> BodyT:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = _path(first["loc"])
        raise GatewayError(400, f"{param}: {first['msg']}.", param=param) from error


def _path(place: tuple[int | str, ...]) -> str:
    """ "messages[0].content" for ("messages", 0, "content", "str"): pydantic adds the alternative that it tried."""
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in ("str", "bool") or part.startswith(("list[", "literal[")):
            break
        else:
            path += f".{part}" if path else part
    return path


def _check_same(body: BaseModel, older: str, newer: str) -> None:
    values = getattr(body, older), getattr(body, newer)
    if None not in values and values[0] != values[1]:
        raise GatewayError(400, f"{older} and {newer} are two names of one thing, but differ.", param=newer)


def _check_comparison(body: ChatCompletion) -> None:
    if body.temperature is not None:
        sentence = "With n = 2 the answers are a comparison: the server sets both temperatures."
        raise GatewayError(400, sentence, param="temperature", code="unsupported_value")
    if body.version:
        sentence = f"With n = 2 the answers are a comparison, which is blind: the model must be {MODEL!r}."
        raise GatewayError(400, sentence, param="model", code="unsupported_value")
