"""What there is before a message, and whether that is still so when its turn begins."""

from dataclasses import dataclass

from server.shared.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from server.shared.model.prompt import Said
from server.store.store import Store
from server.turns.history import recent_turns
from server.turns.messages import NewMessage


@dataclass(frozen=True)
class Before:
    """The state before a message: when its conversation began, in seconds since 1970, its system prompt and its last
    turns; or the id of the result of the first call with the same request_id."""

    conversation_began: float | None = None
    system: str = ""
    history: tuple[Said, ...] | list[Said] = ()
    # The number of the last of these turns, and of the conversation's newest.
    parent: int | None = None
    newest: int | None = None
    first_result: str = ""
    # Another server is still writing an answer here.
    elsewhere: bool = False


def look_back(
    rpc: str, message: NewMessage, replica_id: str, new: Before, max_turns: int, chars: int, store: Store
) -> Before:
    """The state before the message, `new` if it begins a conversation; its last turns have at most about `chars`
    characters. Raises NotFoundError and the errors of a message that cannot be answered here."""
    first = store.requests.find(message.user, rpc, message.request_id, message.body_sha256)
    if first is not None:
        found = first.decode()
        return Before(first_result=found, elsewhere=store.responses.elsewhere(replica_id, found))
    if not message.conversation_id:
        return new
    conversation = store.conversations.get(message.user, message.conversation_id)
    if conversation.kind == "review":
        raise FailedPreconditionError("REVIEW", "This is a review of two answers, not a chat; start a chat.")
    if store.conversations.count_turns(conversation.id) >= max_turns:
        raise ResourceExhaustedError("CONVERSATION_FULL", "This conversation is full; start another one.")
    if message.system not in (None, conversation.system):
        raise InvalidArgumentError("system", "A conversation keeps the system prompt that it began with.")
    if store.responses.elsewhere(replica_id, conversation.id):
        return Before(elsewhere=True)
    turns, parent = recent_turns(store, message.user, conversation.id, chars)
    newest = store.conversations.newest_turn(conversation.id)
    return Before(conversation.create_time, conversation.system, turns, parent, newest)


def check_still(store: Store, rpc: str, message: NewMessage, before: Before) -> None:
    """Raise ConflictError if another server has answered this request_id or gone on with the conversation since."""
    repeated = store.requests.find(message.user, rpc, message.request_id, message.body_sha256) is not None
    if message.conversation_id and not repeated:
        repeated = store.conversations.newest_turn(message.conversation_id) != before.newest
    if repeated:
        raise ConflictError("Another server came first.")
