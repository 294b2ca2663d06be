"""Conversations and their turns."""

from collections.abc import Iterable, Sequence

from server.shared.errors import NotFoundError
from server.store.chats.loading import load_comparisons, load_responses
from server.store.chats.records import Conversation, ConversationKind, Turn
from server.store.database import UNLIMITED, Database, Row, pages
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
        self.get(user, conversation_id)
        rows = self._db.rows(
            "SELECT * FROM turns WHERE conversation_id = ? AND seq > ? ORDER BY seq LIMIT ?",
            [conversation_id, after, limit],
        )
        return load_turns(self._db, rows)

    def path(self, user: str, conversation_id: str, limit: int, last: int | None = None) -> list[Turn]:
        """The turns that the one with the number `last`, or else the newest that has ended, continues, with that one:
        newest first, at most `limit`."""
        self.get(user, conversation_id)
        rows = self._db.rows(
            "WITH RECURSIVE path (seq, parent_seq) AS (SELECT seq, parent_seq FROM turns WHERE seq = "
            # An answer that is being written is no part of what was said.
            "coalesce(?, (SELECT max(seq) FROM turns t LEFT JOIN responses r ON r.id = t.response_id "
            "WHERE t.conversation_id = ? AND coalesce(r.status, '') != 'streaming')) "
            "UNION ALL SELECT turns.seq, turns.parent_seq FROM path JOIN turns ON turns.seq = path.parent_seq) "
            "SELECT * FROM turns WHERE seq IN (SELECT seq FROM path LIMIT ?) ORDER BY seq DESC",
            [last, conversation_id, limit],
        )
        return load_turns(self._db, rows)

    def newest_turn(self, conversation_id: str) -> int | None:
        """The number of the conversation's newest turn; None before the first."""
        [row] = self._db.rows("SELECT max(seq) AS seq FROM turns WHERE conversation_id = ?", [conversation_id])
        return None if row["seq"] is None else int(row["seq"])

    def count_turns(self, conversation_id: str) -> int:
        [row] = self._db.rows("SELECT count(*) AS turns FROM turns WHERE conversation_id = ?", [conversation_id])
        return int(row["turns"])


def load_turns(database: Database, rows: list[Row]) -> list[Turn]:
    """The turns of these rows, in their order."""
    responses = load_responses(database, (row["response_id"] for row in rows))
    comparisons = load_comparisons(database, (row["comparison_id"] for row in rows))
    return [
        Turn(
            seq=row["seq"],
            message=row["message"],
            create_time=row["create_time"],
            dropped=bool(row["dropped"]),
            response=responses.get(row["response_id"]),
            comparison=comparisons.get(row["comparison_id"]),
            given_answer=row["given_answer"],
            parent=row["parent_seq"],
        )
        for row in rows
    ]
