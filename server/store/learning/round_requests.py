"""Requests to run a round, their outcomes, and the learners that listen for them.

A listening learner writes heartbeats, as servers do, and polls for a request. A request is one row, and at most one is
open. One learner takes it, when no other is running a round, and closes it with a sentence. If that learner goes away,
the next one takes it. The user who asked is not stored.
"""

from server.shared.errors import FailedPreconditionError
from server.store.database import Database, Row
from server.store.learning.leases import HELD, LEARNER
from server.store.learning.records import RoundRequest
from server.store.learning.replicas import ALIVE_SECONDS, BEAT_WITHIN

OUTCOME_CHARACTERS = 2000
# SQL, on an open request: no learner that still listens has taken it.
FREE = (
    "NOT EXISTS (SELECT 1 FROM listeners l WHERE l.id = round_requests.listener "
    f"AND l.boot = boot_id() AND uptime() - l.uptime <= {ALIVE_SECONDS})"
)


class RoundRequests:
    """Reads and writes of listeners and requests."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # What a learner does

    def listen(self, listener: str, next_time: float | None) -> None:
        """Record a learner's heartbeat, and when its schedule starts the next round."""
        with self._db.write():
            self._db.execute(
                "INSERT INTO listeners (id, next_time, heartbeat_time, uptime, boot) "
                f"VALUES (?, ?, {self._db.NOW}, uptime(), boot_id()) ON CONFLICT (id) DO UPDATE SET "
                "next_time = excluded.next_time, heartbeat_time = excluded.heartbeat_time, "
                "uptime = excluded.uptime, boot = excluded.boot",
                [listener, next_time],
            )
            # Remove learners that were killed.
            self._db.execute(f"DELETE FROM listeners WHERE NOT ({BEAT_WITHIN})", [100 * ALIVE_SECONDS])

    def leave(self, listener: str) -> None:
        """Remove a learner that stops; an unfinished request that it took is free again."""
        with self._db.write():
            self._db.execute("DELETE FROM listeners WHERE id = ?", [listener])

    def waits(self) -> bool:
        """Whether there is a request that could be taken now."""
        return self.at_work() is None and self._open(FREE) is not None

    def take(self, listener: str) -> int | None:
        """Take the open request for this learner and return its number; None if there is none, or another learner is
        running a round."""
        with self._db.write():
            found = None if self.at_work() else self._open(FREE)
            if found is None:
                return None
            self._db.execute("UPDATE round_requests SET listener = ? WHERE id = ?", [listener, found["id"]])
            return int(found["id"])

    def end(self, request: int, listener: str, outcome: str) -> bool:
        """Close a request with its outcome; False if another learner has taken it since."""
        with self._db.write():
            changed = self._db.execute(
                f"UPDATE round_requests SET end_time = {self._db.NOW}, outcome = ? "
                "WHERE id = ? AND listener = ? AND end_time IS NULL",
                [outcome[:OUTCOME_CHARACTERS], request, listener],
            )
            return changed > 0

    # What an operator does

    def ask(self) -> RoundRequest:
        """The pending request, or a new one. Raises FailedPreconditionError if no learner listens or a round is
        running."""
        with self._db.write():
            if not self.next_times():
                raise FailedPreconditionError(
                    "NO_LEARNER",
                    "No learner listens: start `learner schedule` on the server's data directory, with --on-request if "
                    "rounds should only start on request.",
                )
            if self._open(FREE) is None:
                if self._open() or self.at_work():
                    raise FailedPreconditionError("ROUND_RUNNING", "A round is running; ask again when it is over.")
                self._db.insert("round_requests", {"create_time": self._db.now()})
            last = self.last()
            assert last is not None
            return last

    def last(self) -> RoundRequest | None:
        """The newest request, open or closed."""
        row = self._db.row("SELECT * FROM round_requests ORDER BY id DESC LIMIT 1")
        return _request(row) if row else None

    def next_times(self) -> list[float | None]:
        """When the schedule of each listening learner starts the next round; None if only requests do."""
        rows = self._db.rows(f"SELECT next_time FROM listeners WHERE {BEAT_WITHIN} ORDER BY id", [ALIVE_SECONDS])
        return [row["next_time"] for row in rows]

    def at_work(self) -> str | None:
        """The learner that is running a round, or None. A `running` round without one was stopped or killed."""
        row = self._db.row(f"SELECT holder FROM leases WHERE name = ? AND {HELD}", [LEARNER])
        return str(row["holder"]) if row else None

    def withdraw(self, outcome: str) -> None:
        """Close any open request, and remove all listeners."""
        with self._db.write():
            self._db.execute("DELETE FROM listeners")
            self._db.execute(
                f"UPDATE round_requests SET end_time = {self._db.NOW}, outcome = ? WHERE end_time IS NULL",
                [outcome],
            )

    def _open(self, which: str = "true") -> Row | None:
        return self._db.row(f"SELECT * FROM round_requests WHERE end_time IS NULL AND {which}")


def _request(row: Row) -> RoundRequest:
    return RoundRequest(row["create_time"], row["end_time"], row["outcome"])
