"""The conversation before a message."""

from server.shared.model.prompt import Said
from server.store.store import Store

# Turns per read.
CHUNK = 20


def recent_turns(store: Store, user: str, conversation_id: str, chars: int) -> list[Said]:
    """The last turns of a conversation in order, at most about `chars` characters, without turns that the model must
    not see."""
    found: list[Said] = []
    before: int | None = None
    while chars > 0 and (turns := store.conversations.newest_turns(user, conversation_id, CHUNK, before)):
        said = [(turn.message, turn.answer) for turn in turns if turn.answer is not None]
        found += said
        chars -= sum(len(message) + len(answer) for message, answer in said)
        before = turns[-1].seq
    return found[::-1]
