"""The events of an answer, or of the two answers of a comparison, without what differs between them."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from prefloop.v1.chat_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_STOP_SEQUENCE,
    SLOT_A,
    SLOT_B,
    ChatDelta,
    ChatFinished,
    ChatStarted,
    CompareDelta,
    CompareFinished,
    CompareStarted,
    FinishReason,
    Usage,
)

from clients.async_client import AsyncClient
from clients.calls import AsyncStream, ChatEvent, CompareEvent
from clients.gateway.bodies import ChatCompletion, to_messages
from clients.gateway.errors import GatewayError

INDEX = {SLOT_A: 0, SLOT_B: 1}
FINISH_REASONS = {
    FINISH_REASON_STOP: "stop",
    FINISH_REASON_STOP_SEQUENCE: "stop",
    FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True)
class Begun:
    """`id` is the response's, or the comparison's. `version` is empty while a comparison is blind."""

    id: str
    version: str = ""


@dataclass(frozen=True)
class Piece:
    """Text that choice `index` goes on with."""

    index: int
    text: str


@dataclass(frozen=True)
class Ended:
    """The whole choice `index`; `versions` sampled its tokens, in order."""

    index: int
    text: str
    finish_reason: str
    usage: Usage
    versions: tuple[str, ...] = ()


Event = Begun | Piece | Ended


def ask(
    client: AsyncClient, body: ChatCompletion, request_id: str
) -> AsyncStream[ChatEvent] | AsyncStream[CompareEvent]:
    """The server's stream for a chat completion."""
    messages, stop = to_messages(body.messages), body.stop_sequences
    if body.n == 2:
        return client.compare(messages, max_tokens=body.length, seed=body.seed, stop=stop, request_id=request_id)
    return client.chat(
        messages,
        temperature=body.temperature,
        max_tokens=body.length,
        seed=body.seed,
        stop=stop,
        policy_version=body.version,
        request_id=request_id,
    )


async def events(stream: AsyncStream[ChatEvent] | AsyncStream[CompareEvent]) -> AsyncGenerator[Event]:
    """The events of a stream, which is cancelled when nobody reads them any more. Raises PrefloopError, and
    GatewayError for an answer that was not finished."""
    async with stream:
        async for event in stream:
            match event:
                case ChatStarted():
                    yield Begun(event.response_id, event.policy_version)
                case CompareStarted():
                    yield Begun(event.comparison_id)
                case ChatDelta():
                    yield Piece(0, event.text)
                case CompareDelta():
                    yield Piece(INDEX[event.slot], event.text)
                case ChatFinished():
                    versions = tuple(dict.fromkeys(span.policy_version for span in event.spans))
                    yield Ended(0, event.text, _reason(event.finish_reason), event.usage, versions)
                case CompareFinished():
                    yield Ended(INDEX[event.slot], event.text, _reason(event.finish_reason), event.usage)


def _reason(reason: FinishReason.ValueType) -> str:
    if reason == FINISH_REASON_CANCELLED:
        # Only a repeated request gets such an answer: its first caller left.
        sentence = "The first request with this Idempotency-Key was cancelled; send it with another."
        raise GatewayError(400, sentence, code="request_cancelled")
    if reason not in FINISH_REASONS:
        raise GatewayError(500, "The answer was not finished.")
    return FINISH_REASONS[reason]
