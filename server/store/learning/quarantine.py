"""Users whose votes operators exclude from rounds. Every decision is stored with who, when and why; the last one holds.

A user in quarantine can still vote, and the votes are stored: lifting the quarantine brings all of them back.
"""

from server.shared.errors import NotFoundError
from server.store.database import Database
from server.store.learning.records import QuarantineEvent


class Quarantine:
    """Reads and writes of quarantine decisions."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def set(self, user: str, *, actor: str, reason: str) -> bool:
        """Leave the user's votes out of every round that begins from now on; False if they were left out already.

        Raises NotFoundError for a user who never voted, since the name is most likely misspelt."""
        if not self._db.row("SELECT 1 FROM feedback_events WHERE user = ? LIMIT 1", [user]):
            raise NotFoundError("voter", user)
        return self._say(user, "set", actor, reason)

    def lift(self, user: str, *, actor: str, reason: str) -> bool:
        """Let the user's votes count again; False if they did already."""
        return self._say(user, "lift", actor, reason)

    def current(self) -> dict[str, QuarantineEvent]:
        """The users in quarantine, with the decision that put them there."""
        rows = self._db.rows("SELECT * FROM quarantined ORDER BY seq")
        return {row["user"]: QuarantineEvent(**row) for row in rows}

    def events(self, user: str) -> list[QuarantineEvent]:
        """Every decision on a user, oldest first."""
        rows = self._db.rows("SELECT * FROM quarantine_events WHERE user = ? ORDER BY seq", [user])
        return [QuarantineEvent(**row) for row in rows]

    def _say(self, user: str, action: str, actor: str, reason: str) -> bool:
        with self._db.write():
            if (user in self.current()) == (action == "set"):
                return False
            self._db.insert(
                "quarantine_events",
                {"user": user, "action": action, "actor": actor, "reason": reason, "create_time": self._db.now()},
            )
            return True
