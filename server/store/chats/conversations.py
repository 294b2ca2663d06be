"""Conversations and their turns."""

from collections.abc import Iterable, Sequence

from server.shared.errors import NotFoundError
from server.store.chats.records import Conversation, ConversationKind, Turn
from server.store.chats.responses import load_comparisons, load_responses
from server.store.database import UNLIMITED, Database, pages
from server.store.deletion import Deletion
from server.store.ids import new_id

TITLE_CHARACTERS = 60


class Conversations:
    """Reads and writes of conversations. Those of other users are not found."""

    def __init__(self, database: Database, deletion: Deletion) -> None:
        self._db = database
        self._deletion = deletion

    def create(self, user: str, message: str, kind: ConversationKind = "chat", system: str = "") -> str:
        """Create a conversation, titled with its first message, and return its id."""
        conversation_id, now = new_id("conv"), self._db.now()
        title = " ".join(message.split())
        if len(title) > TITLE_CHARACTERS:
            title = title[: TITLE_CHARACTERS - 1] + "…"
        with self._db.write():
            self._db.insert(
                "conversations",
                {
                    "id": conversation_id,
                    "user": user,
                    "title": title,
                    "create_time": now,
                    "update_time": now,
                    "kind": kind,
                    "system": system,
                },
            )
        return conversation_id

    def count(self, user: str) -> int:
        [row] = self._db.rows(
            "SELECT count(*) AS conversations FROM conversations WHERE user = ? AND kind = 'chat'", [user]
        )
        return int(row["conversations"])

    def get(self, user: str, conversation_id: str) -> Conversation:
        row = self._db.row("SELECT * FROM conversations WHERE id = ? AND user = ?", [conversation_id, user])
        if row is None:
            raise NotFoundError("conversation", conversation_id)
        return Conversation(**row)

    def page(
        self,
        user: str,
        limit: int = UNLIMITED,
        before: tuple[float, str] | None = None,
        kinds: Sequence[ConversationKind] = ("chat",),
    ) -> list[Conversation]:
        """Newest first; `before` is the (update_time, id) after which the page starts."""
        before = before or (float("inf"), "")
        rows = self._db.rows(
            f"SELECT * FROM conversations WHERE user = ? AND kind IN ({', '.join('?' for _ in kinds)}) "
            "AND (update_time, id) < (?, ?) ORDER BY update_time DESC, id DESC LIMIT ?",
            [user, *kinds, *before, limit],
        )
        return [Conversation(**row) for row in rows]

    def delete(self, user: str, conversation_id: str) -> None:
        """Delete the conversation permanently. Raises NotFoundError."""
        with self._db.write():
            self.get(user, conversation_id)
            self._deletion.conversation(conversation_id)

    def existing(self, ids: Iterable[str]) -> set[str]:
        """Those of the conversations, of any user, that were not deleted."""
        return {
            row["id"]
            for page in pages(ids)
            for row in self._db.rows(f"SELECT id FROM conversations WHERE id IN ({', '.join('?' for _ in page)})", page)
        }

    def turns(self, user: str, conversation_id: str, limit: int = UNLIMITED, after: int = 0) -> list[Turn]:
        """The conversation in order: at most `limit` turns after the one with the number `after`."""
        return self._turns(user, conversation_id, "seq > ? ORDER BY seq LIMIT ?", [after, limit])

    def newest_turns(self, user: str, conversation_id: str, limit: int, before: int | None = None) -> list[Turn]:
        """The last turns, newest first: at most `limit` before the one with the number `before`."""
        most = 2**62 if before is None else before
        return self._turns(user, conversation_id, "seq < ? ORDER BY seq DESC LIMIT ?", [most, limit])

    def count_turns(self, conversation_id: str) -> int:
        [row] = self._db.rows("SELECT count(*) AS turns FROM turns WHERE conversation_id = ?", [conversation_id])
        return int(row["turns"])

    def _turns(self, user: str, conversation_id: str, which: str, parameters: list[int]) -> list[Turn]:
        self.get(user, conversation_id)
        rows = self._db.rows(
            f"SELECT * FROM turns WHERE conversation_id = ? AND {which}", [conversation_id, *parameters]
        )
        responses = load_responses(self._db, (row["response_id"] for row in rows))
        comparisons = load_comparisons(self._db, (row["comparison_id"] for row in rows))
        return [
            Turn(
                seq=row["seq"],
                message=row["message"],
                create_time=row["create_time"],
                dropped=bool(row["dropped"]),
                response=responses.get(row["response_id"]),
                comparison=comparisons.get(row["comparison_id"]),
            )
            for row in rows
        ]
