"""Callers' own histories: a call that brings its whole conversation goes on with the stored one that it continues.

A turn of such a call has two digests, which include the user: of everything that the caller sent up to the turn's
message, and of the message alone with its system prompt. The first finds the conversation that a history continues, or
whose message it repeats. The second finds it where the caller has left out the oldest messages. So what is stored grows
with what is new, and a history that is sent again is on the same side of the hold-out.

What the store does not know of a history is added as turns with given answers. White space around a text does not
matter: clients strip it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from server.shared.model.prompt import Said
from server.store.chats.conversations import Conversations, load_turns
from server.store.chats.records import Place, Slot
from server.store.chats.responses import insert_turn, skip_comparison
from server.store.database import Database, Row

# Turns with one message that are looked at, the newest ones, for the answer that was continued.
TURNS = 50


@dataclass(frozen=True)
class OwnHistory:
    """A caller's own conversation before `message`. `said` may begin with an answer alone, whose message is empty."""

    system: str
    said: list[Said]
    message: str

    def digests(self, user: str) -> list[tuple[bytes, bytes]]:
        """Of each message, the new one last: the digest of the history up to it, and that of itself."""
        begin = so_far = _digest(b"", [user, self.system])
        found = []
        for message, answer in [*self.said, (self.message, "")]:
            through = _digest(so_far, ["user", message.strip()])
            found.append((through, _digest(begin, ["asked", message.strip()])))
            so_far = _digest(through, ["assistant", answer.strip()])
        return found


@dataclass(frozen=True)
class _Found:
    """The conversation, the turn in it to continue, None for its beginning, and what is not stored yet."""

    conversation_id: str
    parent: int | None
    new: list[Said]


class Histories:
    """Finds the place of a caller's own history."""

    def __init__(self, database: Database, conversations: Conversations) -> None:
        self._db = database
        self._conversations = conversations

    def place(self, user: str, own: OwnHistory, most_turns: int, create: Callable[[], str]) -> tuple[str, Place]:
        """The id of the conversation, and where the new message goes in it; adds turns that are new. `create` starts a
        conversation, if there is none or it would have more than `most_turns` turns."""
        digests = own.digests(user)
        with self._db.write():
            found = self._find(own, digests)
            if found is None or self._full(found, most_turns):
                found = _Found(create(), None, own.said)
            parent = found.parent
            first = len(own.said) - len(found.new)
            for (message, answer), (history, asked) in zip(found.new, digests[first:], strict=False):
                parent = insert_turn(
                    self._db, found.conversation_id, message, Place(parent, history, asked), given_answer=answer
                )
        return found.conversation_id, Place(parent, *digests[-1])

    def response(self, user: str, own: OwnHistory, answer: str) -> str | None:
        """The id of the newest response to a history that has this answer; also if the caller left out the oldest
        messages."""
        history, asked = own.digests(user)[-1]
        # One message alone may stand in any conversation: it is not taken for the end of another.
        looked_up = [("history", history), *([("asked", asked)] if own.said else [])]
        for column, digest in looked_up:
            for turn in load_turns(self._db, self._newest(column, digest)):
                if turn.response and _same(turn.response.shown, answer):
                    return turn.response.id
        return None

    def _find(self, own: OwnHistory, digests: list[tuple[bytes, bytes]]) -> _Found | None:
        histories = [history for history, _ in digests]
        marks = ", ".join("?" for _ in histories)
        rows = self._db.rows(f"SELECT DISTINCT history FROM turns WHERE history IN ({marks})", histories)
        known = {row["history"] for row in rows}
        longest = max((number for number, history in enumerate(histories) if history in known), default=None)
        if longest is None:
            return self._find_end(own, digests)
        rows = self._newest("history", histories[longest])
        newest = rows[0]
        if longest == len(own.said):
            return _Found(newest["conversation_id"], newest["parent_seq"], [])
        continued = self._continued(rows, own.said[longest][1])
        if continued is None:
            return _Found(newest["conversation_id"], newest["parent_seq"], own.said[longest:])
        return _Found(continued["conversation_id"], continued["seq"], own.said[longest + 1 :])

    def _find_end(self, own: OwnHistory, digests: list[tuple[bytes, bytes]]) -> _Found | None:
        """By the last message that was answered: the caller may have left out the first ones."""
        if not own.said:
            return None
        continued = self._continued(self._newest("asked", digests[-2][1]), own.said[-1][1])
        return _Found(continued["conversation_id"], continued["seq"], []) if continued else None

    def _newest(self, column: str, digest: bytes) -> list[Row]:
        return self._db.rows(f"SELECT * FROM turns WHERE {column} = ? ORDER BY seq DESC LIMIT ?", [digest, TURNS])

    def _continued(self, rows: list[Row], answer: str) -> Row | None:
        """The newest of these turns that has this answer. An open comparison is skipped: it goes on with this one."""
        for row, turn in zip(rows, load_turns(self._db, rows), strict=True):
            compared = turn.comparison
            if compared and compared.state == "open":
                answers: dict[Slot, str | None] = {"A": compared.a.shown, "B": compared.b.shown}
                slot = next((slot for slot, text in answers.items() if _same(text, answer)), None)
                if slot:
                    skip_comparison(self._db, compared.id, slot)
                    return row
            elif _same(turn.answer, answer):
                return row
        return None

    def _full(self, found: _Found, most_turns: int) -> bool:
        return self._conversations.count_turns(found.conversation_id) + len(found.new) >= most_turns


def _same(text: str | None, answer: str) -> bool:
    return text is not None and text.strip() == answer.strip()


def _digest(before: bytes, texts: list[str]) -> bytes:
    return hashlib.sha256(before + json.dumps(texts).encode()).digest()
