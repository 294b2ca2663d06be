"""API keys: 256 random bits that identify a user and a role. The store only has their SHA-256.

A key is "ID.SECRET". The id finds the row and may be shown; the secret is shown once, when the key is created. A plain
hash is enough, since 256 bits cannot be guessed. A revoked key stays on record, so that a server that ever had a key
never accepts a caller without one again.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Literal

from server.shared.errors import InvalidArgumentError, NotFoundError
from server.store.database import Database
from server.store.ids import new_id

Role = Literal["user", "operator"]

SECRET_BYTES = 32
USER_NAME = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class Caller:
    """A user and their role. An operator may do whatever a user may."""

    user: str
    role: Role
    # Whether a key identifies the user, not merely their own metadata.
    has_key: bool = True

    def may(self, needed: Role) -> bool:
        return self.role == "operator" or needed == "user"


@dataclass(frozen=True)
class Key:
    """A key without its secret. `user` is empty if that user was deleted."""

    id: str
    user: str
    role: Role
    create_time: float
    revoke_time: float | None


@dataclass(frozen=True)
class Credentials:
    """The valid keys as of one reading; `closed`: there has ever been a key, so callers need one."""

    callers: dict[str, tuple[bytes, Caller]]
    closed: bool
    # Changes when a key is created or revoked.
    mark: tuple[int, int] = (0, 0)

    def caller(self, key: str) -> Caller | None:
        """The caller that a key identifies, or None."""
        key_id, _, secret = key.partition(".")
        sha256, caller = self.callers.get(key_id, (b"", None))
        # In constant time, so that the duration of a refusal reveals nothing about the secret.
        return caller if hmac.compare_digest(sha256, _sha256(secret)) else None


class Keys:
    """The keys in the store."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, user: str, role: Role) -> str:
        """Create a key and return it; it can never be shown again. Raises InvalidArgumentError."""
        check_user_name(user)
        key_id, secret = new_id("key"), secrets.token_urlsafe(SECRET_BYTES)
        row = {"id": key_id, "sha256": _sha256(secret), "user": user, "role": role, "create_time": self._db.now()}
        with self._db.write():
            self._db.insert("keys", row)
        return f"{key_id}.{secret}"

    def revoke(self, key_id: str) -> None:
        """Revoke a key; no change if it is revoked already. Raises NotFoundError."""
        with self._db.write():
            changed = self._db.execute(
                f"UPDATE keys SET revoke_time = coalesce(revoke_time, {self._db.NOW}) WHERE id = ?", [key_id]
            )
            if not changed:
                raise NotFoundError("key", key_id)

    def forget(self, user: str) -> None:
        """Revoke the user's keys, and delete their user and hash."""
        with self._db.write():
            self._db.execute(
                f"UPDATE keys SET user = '', sha256 = ?, revoke_time = coalesce(revoke_time, {self._db.NOW}) "
                "WHERE user = ?",
                [b"", user],
            )

    def all(self) -> list[Key]:
        """Every key ever created, oldest first."""
        rows = self._db.rows("SELECT id, user, role, create_time, revoke_time FROM keys ORDER BY create_time, id")
        return [Key(**row) for row in rows]

    def credentials(self, known: Credentials | None = None) -> Credentials:
        """The keys that are valid now; `known` itself if nothing has changed since."""
        [row] = self._db.rows(
            "SELECT coalesce((SELECT max(rowid) FROM keys), 0) AS made, "
            "(SELECT count(*) FROM keys WHERE revoke_time IS NOT NULL) AS revoked"
        )
        mark = (row["made"], row["revoked"])
        if known and known.mark == mark:
            return known
        rows = self._db.rows("SELECT id, sha256, user, role FROM keys WHERE revoke_time IS NULL")
        callers = {row["id"]: (row["sha256"], Caller(row["user"], row["role"])) for row in rows}
        return Credentials(callers, closed=bool(mark[0]), mark=mark)


def check_user_name(user: str) -> None:
    """Raise InvalidArgumentError for an invalid user name. Names are printable ASCII, as in gRPC metadata."""
    if not USER_NAME.fullmatch(user):
        raise InvalidArgumentError("user", "A user name is 1 to 128 printable ASCII characters without spaces.")


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
