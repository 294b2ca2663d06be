"""The conversation before a message."""

from server.shared.model.prompt import Said
from server.store.store import Store

# Turns per read.
CHUNK = 20


def recent_turns(store: Store, user: str, conversation_id: str, chars: int) -> tuple[list[Said], int | None]:
    """The last turns that a conversation's newest one continues, in order and with that one: at most about `chars`
    characters, without turns that the model must not see. And the number of the last of them, which a next message
    continues; None if there is none."""
    found: list[Said] = []
    last: int | None = None
    parent: int | None = None
    while chars > 0 and (turns := store.conversations.path(user, conversation_id, CHUNK, last)):
        seen = [turn for turn in turns if turn.answer is not None]
        said = [(turn.message, turn.answer or "") for turn in seen]
        parent = parent if parent is not None or not seen else seen[0].seq
        found += said
        chars -= sum(len(message) + len(answer) for message, answer in said)
        last = turns[-1].parent
        if last is None:
            break
    return found[::-1], parent
