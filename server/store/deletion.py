"""Permanent deletion of a conversation, of conversations inactive for long, and of all data of a user.

Rows are deleted, and their content in the log of votes, whose event numbers stay valid for watermarks and lineage. A
step is one short transaction, so that votes are not delayed; a user's name is removed by the last one, so that a
deletion repeated after a kill still finds what was trained on the user. What rows leave behind elsewhere is removed by
`server.store.files.residue`.
"""

import json
from dataclasses import dataclass

from server.store.database import Database
from server.store.learning.lineage import Lineage

# Conversations deleted per transaction.
STEP = 20
# SQL: the feedback of conversation ?1, in `feedback` and in `feedback_events`.
OF_CONVERSATION = (
    "(response_id IN (SELECT id FROM responses WHERE conversation_id = ?1) "
    "OR comparison_id IN (SELECT id FROM comparisons WHERE conversation_id = ?1))"
)


@dataclass(frozen=True)
class Kept:
    """Stored data of a user, and what was trained on it. Versions are oldest first."""

    conversations: int
    votes: int
    policy_versions: list[str]
    reward_model_versions: list[str]
    # Running with these votes: what they publish is trained on them, too.
    running_round_ids: list[str]


class Deletion:
    """Deletes rows permanently."""

    def __init__(self, database: Database, lineage: Lineage) -> None:
        self._db = database
        self._lineage = lineage

    def deletions(self) -> int:
        """A number that grows with every deletion: what was created under a smaller one may hold deleted data."""
        return int(self._db.rows("SELECT number FROM deletions")[0]["number"])

    def look(self, user: str) -> Kept:
        """What is stored of a user, also after an interrupted deletion."""
        [found] = self._db.rows(
            "SELECT (SELECT count(*) FROM conversations WHERE user = ?1) AS conversations, "
            "(SELECT count(*) FROM feedback WHERE user = ?1) AS votes",
            [user],
        )
        rounds = self._lineage.rounds_trained_on(user)
        marks = ", ".join("?" * len(rounds)) or "NULL"
        models = self._db.rows(
            f"SELECT version FROM reward_models WHERE round_id IN ({marks}) ORDER BY create_time", rounds
        )
        running = self._db.rows(f"SELECT id FROM rounds WHERE state = 'running' AND id IN ({marks})", rounds)
        return Kept(
            conversations=int(found["conversations"]),
            votes=int(found["votes"]),
            policy_versions=list(self._lineage.carriers(rounds)),
            reward_model_versions=[row["version"] for row in models],
            running_round_ids=[row["id"] for row in running],
        )

    def step(self, user: str) -> bool:
        """Delete some of a user's data; False once that was the last of it."""
        with self._db.write():
            rows = self._db.rows("SELECT id FROM conversations WHERE user = ? LIMIT ?", [user, STEP])
            if not rows:
                self._rest(user)
            for row in rows:
                self.conversation(row["id"])
            return bool(rows)

    def expire(self, days: float) -> bool:
        """Delete some conversations without a message or vote for `days` days; False once there are none."""
        with self._db.write():
            rows = self._db.rows(
                "SELECT id FROM conversations c WHERE update_time < ?1 AND NOT EXISTS (SELECT 1 FROM feedback f "
                "JOIN responses r ON r.id = f.response_id WHERE r.conversation_id = c.id AND f.create_time >= ?1) "
                "AND NOT EXISTS (SELECT 1 FROM feedback f JOIN comparisons o ON o.id = f.comparison_id "
                "WHERE o.conversation_id = c.id AND f.create_time >= ?1) ORDER BY update_time LIMIT ?2",
                [self._db.now() - days * 86_400, STEP],
            )
            for row in rows:
                self.conversation(row["id"])
            return bool(rows)

    def conversation(self, conversation_id: str) -> None:
        """Delete a conversation, its answers and its votes, and the reviews of its prompts. The votes' events stay,
        without their content."""
        with self._db.write():
            for row in self._db.rows(
                "SELECT c.conversation_id AS id FROM reviews r JOIN reviewed ON review_seq = r.seq "
                "JOIN comparisons c ON c.id = comparison_id WHERE r.conversation_id = ?",
                [conversation_id],
            ):
                self.conversation(row["id"])
            self._log_deletions(OF_CONVERSATION, conversation_id)
            # By events and not by current votes: replaced and retracted ones are still in the log.
            self._db.execute(
                f"UPDATE feedback_events SET value = NULL, comment = NULL WHERE {OF_CONVERSATION}", [conversation_id]
            )
            # The ids stay in use: a repeated message must not start a conversation that its user deleted.
            self._db.execute(
                "UPDATE requests SET body_sha256 = ?2, result = ?2 WHERE target IN (SELECT id FROM responses WHERE "
                "conversation_id = ?1 UNION ALL SELECT id FROM comparisons WHERE conversation_id = ?1)",
                [conversation_id, b""],
            )
            self._db.execute(
                "UPDATE machine_choices SET shown = NULL, swapped = NULL "
                "WHERE comparison_id IN (SELECT id FROM comparisons WHERE conversation_id = ?)",
                [conversation_id],
            )
            # Comparisons first: they reference their responses without a cascade.
            self._db.execute("DELETE FROM comparisons WHERE conversation_id = ?", [conversation_id])
            self._db.execute("DELETE FROM conversations WHERE id = ?", [conversation_id])
            self._count()

    def rewrite_due(self) -> int:
        """The number of deletions if the file was not rewritten since the last one, else 0."""
        [row] = self._db.rows("SELECT number, rewritten FROM deletions")
        return int(row["number"]) if row["number"] > row["rewritten"] else 0

    def rewritten(self, number: int) -> None:
        """Record that the file was rewritten after `number` deletions."""
        with self._db.write():
            self._db.execute("UPDATE deletions SET rewritten = ?", [number])

    def _rest(self, user: str) -> None:
        """Delete demonstrations, the log's content, repeated requests, and then the name."""
        self._log_deletions("user = ?1", user)
        self._db.execute("DELETE FROM feedback WHERE user = ?", [user])
        self._db.execute("DELETE FROM requests WHERE user = ?", [user])
        self._db.execute("UPDATE machine_choices SET user = '' WHERE user = ?", [user])
        self._db.execute("DELETE FROM quarantine_events WHERE user = ?", [user])
        for row in self._db.rows("SELECT id, quarantined FROM rounds WHERE quarantined != '[]'"):
            if user in (names := json.loads(row["quarantined"])):
                names.remove(user)
                self._db.execute("UPDATE rounds SET quarantined = ? WHERE id = ?", [json.dumps(names), row["id"]])
        self._db.execute("UPDATE feedback_events SET user = '', value = NULL, comment = NULL WHERE user = ?", [user])
        self._count()

    def _log_deletions(self, which: str, parameter: str) -> None:
        self._db.execute(
            "INSERT INTO feedback_events (action, feedback_id, user, kind, response_id, comparison_id, create_time) "
            f"SELECT 'delete', id, user, kind, response_id, comparison_id, {self._db.NOW} FROM feedback "
            f"WHERE {which} ORDER BY event_seq",
            [parameter],
        )

    def _count(self) -> None:
        self._db.execute("UPDATE deletions SET number = number + 1")
