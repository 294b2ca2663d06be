"""What a turn begins with, and what comes of it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server.shared.model.prompt import Said
from server.store.chats.records import Generation
from server.turns.comparison import Ended, WriteDelta

Write = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class NewMessage:
    """A user's message, and how to sample the answer; None: the server's default."""

    user: str
    text: str
    # Empty: start a new conversation.
    conversation_id: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    # The system prompt of a new conversation. None: the server's default, or the conversation's own.
    system: str | None = None
    # The caller's own history before the message, which then has no `conversation_id`.
    said: list[Said] | None = None
    # The answer ends before the first of these.
    stop: tuple[str, ...] = ()
    # A live version to answer with. Empty: what is loaded when the answer begins.
    policy_version: str = ""
    # A call that repeats this id with the same body gets the first call's result. Empty: calls are never repeats.
    request_id: str = ""
    body_sha256: bytes = b""


@dataclass(frozen=True)
class ChatTurn:
    """A message and its answer."""

    conversation_id: str
    response_id: str
    # The version that is loaded when the turn begins.
    policy_version: str
    prompt_token_ids: list[int]
    stream: Callable[[Write], Awaitable[Generation]]
    """Writes the answer's text piece by piece; returns the whole answer, once it is on disk."""


@dataclass(frozen=True)
class ComparisonTurn:
    """A message and its two answers."""

    conversation_id: str
    comparison_id: str
    prompt_token_ids: list[int]
    stream: Callable[[WriteDelta, Ended], Awaitable[None]]
    """Writes the text of both answers piece by piece, and reports the end of each once it is on disk."""
