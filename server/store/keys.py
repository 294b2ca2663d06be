"""API keys: 256 random bits that identify a user and a role. The store only has their SHA-256.

A key is "ID.SECRET". The id finds the row and may be shown; the secret is shown once, when the key is created. A plain
hash is enough, since 256 bits cannot be guessed. A revoked key stays on record, so that a server that ever had a key
never accepts a caller without one again.

A key of the role `application` speaks for many people. It names them in its own namespace: its end user `ana` is the
user `shop/ana`, with votes, limits and data of their own. No key of another user can have such a name.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, replace
from typing import Literal

from server.shared.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, PermissionDeniedError
from server.store.database import Database
from server.store.ids import new_id

Role = Literal["user", "application", "operator"]

SECRET_BYTES = 32
# Every server has seen an entry by then.
SEEN_SECONDS = 3600.0
USER_NAME = re.compile(r"[\x21-\x7e]{1,128}")
# Together, with what is between them, not longer than a user's name.
APPLICATION_NAME = re.compile(r"[\x21-\x2e\x30-\x7e]{1,63}")
END_USER_NAME = re.compile(r"[\x21-\x7e]{1,64}")
BETWEEN = "/"


@dataclass(frozen=True)
class Caller:
    """A user and their role. An operator may do whatever a user may, and so may an application."""

    user: str
    role: Role
    # Whether a key identifies the user, not merely their own metadata.
    has_key: bool = True
    # The application that speaks for the user, if one does.
    application: str = ""

    def may(self, needed: Role) -> bool:
        return needed in ("user", self.role)

    def on_behalf_of(self, end_user: str) -> "Caller":
        """The same caller with one of its end users. Raises PermissionDeniedError for other keys, and
        InvalidArgumentError for an invalid name."""
        if self.has_key and self.role != "application":
            raise PermissionDeniedError("Only a key with the role application may name an end user.")
        if not END_USER_NAME.fullmatch(end_user):
            sentence = "An end user's name is 1 to 64 printable ASCII characters without spaces."
            raise InvalidArgumentError("x-end-user", sentence)
        return replace(self, user=f"{self.user}{BETWEEN}{end_user}", application=self.user)


@dataclass(frozen=True)
class Key:
    """A key without its secret. `user` is empty if that user was deleted."""

    id: str
    user: str
    role: Role
    create_time: float
    revoke_time: float | None


@dataclass(frozen=True)
class Forgotten:
    """An entry about a deleted user: the hash of the name (`sha256`), and the age in seconds."""

    seq: int
    user_sha256: bytes
    age: float


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
        expected, caller = self.callers.get(key_id, (b"", None))
        # In constant time, so that the duration of a refusal reveals nothing about the secret.
        return caller if hmac.compare_digest(expected, sha256(secret)) else None


class Keys:
    """The keys in the store."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, user: str, role: Role) -> str:
        """Create a key and return it; it can never be shown again. Raises InvalidArgumentError."""
        check_user_name(user)
        key_id, secret = new_id("key"), secrets.token_urlsafe(SECRET_BYTES)
        row = {"id": key_id, "sha256": sha256(secret), "user": user, "role": role, "create_time": self._db.now()}
        with self._db.write():
            self._check_namespace(user, role)
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

    def forget(self, user: str) -> int:
        """Revoke the user's keys, delete their user and hash, and let every server end the user's calls by an entry
        (`forgotten`), whose number this returns. Raises FailedPreconditionError for an application whose end users have
        data: another user could get its name, and so theirs."""
        with self._db.write():
            application = self._db.row("SELECT 1 FROM keys WHERE user = ? AND role = 'application'", [user])
            if application and (others := self._with_data(user + BETWEEN)):
                sentence = f"{len(others)} end users of {user} have data, {others[0]} for one; delete theirs first."
                raise FailedPreconditionError("END_USERS", sentence)
            self._db.execute(
                f"UPDATE keys SET user = '', sha256 = ?, revoke_time = coalesce(revoke_time, {self._db.NOW}) "
                "WHERE user = ?",
                [b"", user],
            )
            return self._db.insert("forgotten", {"user_sha256": sha256(user), "create_time": self._db.now()})

    def forgotten(self, after: int) -> list[Forgotten]:
        """Who was deleted after the entry `after`, oldest first."""
        now = self._db.now()
        rows = self._db.rows("SELECT seq, user_sha256, create_time FROM forgotten WHERE seq > ? ORDER BY seq", [after])
        return [Forgotten(row["seq"], bytes(row["user_sha256"]), now - row["create_time"]) for row in rows]

    def drop_forgotten(self) -> None:
        """Delete the entries that every server has seen. Their numbers do not come again."""
        with self._db.write():
            self._db.execute("DELETE FROM forgotten WHERE create_time < ?", [self._db.now() - SEEN_SECONDS])

    def all(self) -> list[Key]:
        """Every key ever created, oldest first."""
        rows = self._db.rows("SELECT id, user, role, create_time, revoke_time FROM keys ORDER BY create_time, id")
        return [Key(**row) for row in rows]

    def _check_namespace(self, user: str, role: Role) -> None:
        """Raise InvalidArgumentError if an application's end users could have this user's name, or it theirs."""
        if role == "application" and not APPLICATION_NAME.fullmatch(user):
            sentence = f"An application's name has at most 63 characters and no {BETWEEN!r}."
            raise InvalidArgumentError("user", sentence)
        others = self._db.rows("SELECT DISTINCT user, role FROM keys")
        taken = [row["user"] for row in others if role == "application" and row["user"].startswith(user + BETWEEN)]
        if taken:
            raise InvalidArgumentError("user", f"An end user of {user} would have the name of the user {taken[0]}.")
        names = {row["user"] for row in others if row["role"] == "application"}
        if role == "application" and user not in names and (taken := self._with_data(user + BETWEEN)):
            raise InvalidArgumentError("user", f"An end user of {user} would have the data of the user {taken[0]}.")
        application = user.partition(BETWEEN)[0]
        if application != user and application in names:
            raise InvalidArgumentError("user", f"{user} is the name of an end user of the application {application}.")

    def _with_data(self, prefix: str) -> list[str]:
        """The users with data whose names begin so."""
        rows = self._db.rows(
            "SELECT DISTINCT user FROM (SELECT user FROM conversations UNION ALL SELECT user FROM feedback) AS known "
            "WHERE substr(user, 1, ?) = ? ORDER BY user",
            [len(prefix), prefix],
        )
        return [row["user"] for row in rows]

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


def sha256(text: str) -> bytes:
    """What is stored of a key's secret, and of a deleted user's name."""
    return hashlib.sha256(text.encode()).digest()
