"""A configured SQLite connection: WAL, synchronous FULL, and writes that begin IMMEDIATE.

`write()` is atomic and durable: once it returns, the data survives a power cut; inside a `group()`, once that returns.
Two processes may write; the later one waits up to `BUSY_TIMEOUT_MS`. A connection is used by one thread at a time.
Deleted or replaced data is overwritten with zeros. Other users of the machine cannot read the file.

Several releases may use the same file. An older schema is migrated once no process of that release is alive; after a
newer release has migrated the file, writes are refused.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pysqlite3.dbapi2 as sqlite3
import sqlite_utils

from server.shared.errors import DatabaseError, DataDirectoryError, advice
from server.store.database import Row
from server.store.migrations import known_migrations, migrations
from server.store.sqlite.clock import boot_id, uptime
from server.store.transactions import Transactions
from server.store.upgrades import SIGN_SECONDS, check

# Its name in a data directory.
DATABASE = "prefloop.db"
BUSY_TIMEOUT_MS = 10_000
# How long to try to empty the log, and how long one try may block writers while others read.
EMPTY_SECONDS = 2.0
EMPTY_TIMEOUT_MS = 50
# Earlier releases can lose a commit when two connections reset the WAL; the fix was backported to two older lines.
MENDED_SQLITE = (3, 51, 3)
MENDED_LINES = {(3, 50): 7, (3, 44): 6}

# Per kind of process: its table, the column of its name, and until when it counts as alive: by the time of day, which
# all releases write.
LIVING = (
    ("server", "replicas", "id", f"heartbeat_time + {SIGN_SECONDS}"),
    ("learner", "listeners", "id", f"heartbeat_time + {SIGN_SECONDS}"),
    ("learner", "leases", "holder", "expire_time"),
)

# Kinds of errors, by the beginning of SQLite's error name.
KINDS: dict[str, Literal["full", "damaged", "busy"]] = {
    "SQLITE_FULL": "full",
    "SQLITE_CORRUPT": "damaged",
    "SQLITE_NOTADB": "damaged",
    "SQLITE_BUSY": "busy",
}


def sqlite_version() -> tuple[int, int, int]:
    """Version of the loaded library."""
    major, minor, patch = sqlite3.sqlite_version_info
    return major, minor, patch


def sqlite_problem(version: tuple[int, int, int]) -> str | None:
    """Why this release of SQLite can lose commits, and what to do; None if it cannot."""
    line, patch = version[:2], version[2]
    if version >= MENDED_SQLITE or (line in MENDED_LINES and patch >= MENDED_LINES[line]):
        return None
    return f"SQLite {'.'.join(map(str, version))} can lose commits; install pysqlite3 with SQLite 3.51.3 or newer."


def peek(path: Path, sql: str) -> str | None:
    """The first value that a query finds in the file, whatever its schema; None if there is none, or it cannot be read.
    Changes nothing."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute(sql).fetchone()
    except sqlite3.DatabaseError:
        return None
    return None if row is None else str(row[0])


def _translated(error: sqlite3.DatabaseError) -> DatabaseError:
    """The store's error for an SQLite error."""
    name = getattr(error, "sqlite_errorname", "")
    return DatabaseError(str(error), next((KINDS[start] for start in KINDS if name.startswith(start)), "other"))


def _make_private(path: Path) -> None:
    """Create the file with access for its owner only; from an existing one and its logs, remove others' permissions."""
    os.close(os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
    for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
        # Leave files of another user alone, and permissions of the group: these are up to the owner.
        if file.exists() and file.stat().st_uid == os.geteuid() and file.stat().st_mode & 0o007:
            file.chmod(file.stat().st_mode & 0o770)


class SqliteDatabase(Transactions):
    """A migrated database file. Raises DataDirectoryError if the file cannot be used."""

    SIDE_BY_SIDE = False
    NOW = "unixepoch('subsec')"
    AMONG = "user IN (SELECT value FROM json_each(?))"
    DAY = "CAST(create_time / 86400 AS INTEGER)"

    def __init__(self, path: Path) -> None:
        if reason := sqlite_problem(sqlite_version()):
            raise DataDirectoryError(reason)
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_private(path)
            connection = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)
            connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")
            connection.create_function("uptime", 0, uptime)
            connection.create_function("boot_id", 0, boot_id)
            self._db = sqlite_utils.Database(connection, recursive_triggers=False)
            self._schema: int | None = None
            self._migrate(path)
            self._schema = self._schema_version()
        except (OSError, DatabaseError, sqlite3.DatabaseError) as error:
            known = _translated(error) if isinstance(error, sqlite3.DatabaseError) else error
            raise DataDirectoryError(
                f"The data directory {str(path.parent)!r} cannot be used ({error}); {advice(known)}."
            ) from error

    def _migrate(self, path: Path) -> None:
        # Take the write lock first: two processes may open a new directory at once.
        with self.write():
            applied = {migration.name for migration in migrations.applied(self._db)}
            check(f"The data directory {str(path.parent)!r}", applied, known_migrations(), self._alive)
            migrations.apply(self._db)

    def _alive(self) -> str | None:
        """A server or learner with a recent heartbeat, or None."""
        tables = {row["name"] for row in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for kind, table, name, until in LIVING:
            if table not in tables:
                continue
            if row := self.row(f"SELECT {name} AS name FROM {table} WHERE {until} > unixepoch('subsec')"):
                return f"{kind} {row['name']}"
        return None

    def _check_schema(self) -> None:
        """Raise DataDirectoryError if a newer release has migrated the file since it was opened."""
        if self._schema in (None, version := self._schema_version()):
            return
        if {migration.name for migration in migrations.applied(self._db)} - known_migrations():
            raise DataDirectoryError("A newer prefloop has migrated the data directory; restart this process.")
        self._schema = version

    def _schema_version(self) -> int:
        return int(self._execute("PRAGMA schema_version").fetchone()[0])

    def _in_transaction(self) -> bool:
        return bool(self._db.conn.in_transaction)

    def _begin(self) -> None:
        # DEFERRED, SQLite's default, gets SQLITE_BUSY at once when it changes from reading to writing in WAL mode.
        self._execute("BEGIN IMMEDIATE")
        self._check_schema()

    def _mark(self, sql: str) -> None:
        for statement in sql.split("; "):
            self._execute(statement)

    def _rollback(self) -> None:
        self._db.rollback()

    def settled(self) -> AbstractContextManager[None]:
        """Numbers are drawn under the write lock, so they are committed in their order."""
        return nullcontext()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Everything read inside is from one moment."""
        self._execute("BEGIN")
        try:
            yield
        finally:
            self._execute("ROLLBACK")

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement; return the number of rows it changed."""
        return int(self._execute(sql, parameters).rowcount)

    def insert(self, table: str, row: Row) -> int:
        """Insert one row; return its rowid."""
        # sqlite-utils' insert looks up the table's schema each time, which costs more than the insert itself.
        columns, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
        statement = f'INSERT INTO "{table}" ({columns}) VALUES ({marks})'
        return int(self._execute(statement, list(row.values())).lastrowid or 0)

    def load(self, table: str, rows: Sequence[Row]) -> None:
        """Insert many rows with their numbers; later rows get greater ones."""
        for row in rows:
            self.insert(table, row)

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a SELECT as dictionaries."""
        # sqlite-utils' query puts a savepoint around each SELECT: three statements, each of which releases the GIL.
        try:
            cursor = self._db.conn.execute(sql, parameters)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]
        except sqlite3.DatabaseError as error:
            raise _translated(error) from error

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Row | None:
        """The first row of a SELECT, or None."""
        return next(iter(self.rows(sql, parameters)), None)

    def now(self) -> float:
        """Seconds since 1970 by the database's clock."""
        return float(self.rows("SELECT unixepoch('subsec') AS now")[0]["now"])

    def copy_to(self, path: Path) -> None:
        """Copy the database, as of one moment, to `path` while others write. Not durable until the caller syncs it.

        Raises DataDirectoryError if it is damaged."""
        try:
            with closing(sqlite3.connect(str(path))) as copy:
                # Copy all pages in one step: it reads one snapshot, and no writer waits.
                self._db.conn.backup(copy)
                [found] = copy.execute("PRAGMA integrity_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            raise _translated(error) from error
        if found != "ok":
            raise DataDirectoryError(f"The database is damaged: {found}.")

    def rewrite(self) -> bool:
        """Rewrite the whole file (VACUUM), without what deleted rows left in it. Writers wait. It needs as much memory
        as the file's size, because pysqlite3 is built to keep temporary data in memory."""
        self._execute("VACUUM")
        return True

    def empty_log(self, seconds: float = EMPTY_SECONDS) -> bool:
        """Move the log (`-wal`) into the file and truncate it; False if others kept reading all the time."""
        deadline = time.monotonic() + seconds
        self._execute(f"PRAGMA busy_timeout = {EMPTY_TIMEOUT_MS}")
        try:
            while self._execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > deadline:
                    return False
                time.sleep(EMPTY_TIMEOUT_MS / 1000)
            return True
        finally:
            self._execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")

    def bytes(self) -> int:
        """Size of the database's file in bytes."""
        return self._path.stat().st_size

    def close(self) -> None:
        self._db.close()

    def _execute(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        try:
            return self._db.conn.execute(sql, parameters)
        except sqlite3.DatabaseError as error:
            raise _translated(error) from error
