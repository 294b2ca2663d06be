"""Servers and the version that each has loaded, from their heartbeats."""

from server.store.database import Database
from server.store.learning.records import Replica

# A server without a heartbeat for this long is gone.
ALIVE_SECONDS = 30.0
# SQL: the last heartbeat of a replica or listener is at most so many seconds old, by the clock that cannot be set.
BEAT_WITHIN = "boot = boot_id() AND uptime() - uptime <= ?"


class Replicas:
    """Reads and writes of servers."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def report(self, replica_id: str, loaded_version: str, error: str = "") -> None:
        """Record what a server has loaded, and why it is not the active version, if it is not."""
        with self._db.write():
            self._db.execute(
                "INSERT INTO replicas (id, loaded_version, error, heartbeat_time, uptime, boot) "
                f"VALUES (?, ?, ?, {self._db.NOW}, uptime(), boot_id()) ON CONFLICT (id) DO UPDATE SET "
                "loaded_version = excluded.loaded_version, error = excluded.error, "
                "heartbeat_time = excluded.heartbeat_time, uptime = excluded.uptime, boot = excluded.boot",
                [replica_id, loaded_version, error],
            )

    def remove(self, replica_id: str) -> None:
        """Remove a server that stops."""
        with self._db.write():
            self._db.execute("DELETE FROM replicas WHERE id = ?", [replica_id])

    def alive(self, max_age: float = ALIVE_SECONDS) -> list[Replica]:
        """Servers whose heartbeat is at most `max_age` seconds old."""
        rows = self._db.rows(
            "SELECT id, loaded_version, error, heartbeat_time, uptime() - uptime AS age FROM replicas "
            f"WHERE {BEAT_WITHIN} ORDER BY id",
            [max_age],
        )
        return [Replica(**row) for row in rows]
