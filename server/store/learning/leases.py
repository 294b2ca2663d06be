"""Leases: the exclusive right to do something for a limited time, on the clock that cannot be set."""

from server.shared.errors import ConflictError
from server.store.database import Database
from server.store.learning.records import Lease

# The lease of the one learner that may run a round.
LEARNER = "learner"
# SQL: the lease is held.
HELD = "(boot = boot_id() AND expire_uptime > uptime())"


class Leases:
    """Reads and writes of leases."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def acquire(self, name: str, holder: str, seconds: float) -> Lease | None:
        """The lease, or None while another holder has it. A new holder gets a higher token."""
        with self._db.write():
            old = self._db.row(f"SELECT *, {HELD} AS held FROM leases WHERE name = ?", [name])
            if old and old["held"] and old["holder"] != holder:
                return None
            token = old["token"] + 1 if old else 1
            self._db.execute(
                "INSERT INTO leases (name, holder, token, expire_time, expire_uptime, boot) "
                f"VALUES (?1, ?2, ?3, {self._db.NOW} + ?4, uptime() + ?4, boot_id()) "
                "ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, "
                "token = excluded.token, expire_time = excluded.expire_time, "
                "expire_uptime = excluded.expire_uptime, boot = excluded.boot",
                [name, holder, token, seconds],
            )
            return Lease(name, holder, token)

    def renew(self, lease: Lease, seconds: float) -> None:
        """Extend the lease to `seconds` from now. Raises ConflictError once a later holder exists."""
        with self._db.write():
            check_fence(self._db, lease)
            self._db.execute(
                f"UPDATE leases SET expire_time = {self._db.NOW} + ?1, expire_uptime = uptime() + ?1 WHERE name = ?2",
                [seconds, lease.name],
            )

    def release(self, lease: Lease) -> None:
        """Give the lease back, if it is still this holder's. The token stays, so that the next one is higher."""
        with self._db.write():
            self._db.execute(
                "UPDATE leases SET expire_time = 0, expire_uptime = 0 WHERE name = ? AND token = ?",
                [lease.name, lease.token],
            )


def check_fence(database: Database, fence: Lease | None) -> None:
    """Raise ConflictError if a later holder of the lease exists. Call it in the transaction that it guards."""
    if fence is None:
        return
    row = database.row("SELECT token, holder FROM leases WHERE name = ?", [fence.name])
    if row is None or row["token"] != fence.token:
        holder = row["holder"] if row else "nobody"
        raise ConflictError(f"The lease {fence.name!r} went to {holder}; nothing was written.")
