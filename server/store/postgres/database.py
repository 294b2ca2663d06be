"""A database of a PostgreSQL server: several servers and learners may use it from several machines.

Writers take an advisory lock, for the length of a transaction: alone, or, where a group's writes depend on some users'
data only, together with others of the kind but alone for each user. So whatever is read before a write still holds when
that is committed, and the store's code is the same as for SQLite. Nothing is kept in a session: no prepared statement,
no setting, no lock. So a pooler that lends connections by the transaction may stand in between.

PostgreSQL's clock is what leases and heartbeats go by. It can be set; a fence does not depend on it.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout

from server.shared.errors import DatabaseError, DataDirectoryError
from server.store.database import Row
from server.store.postgres import address, upgrade
from server.store.postgres.dialect import statement
from server.store.transactions import Transactions

Connection = psycopg.Connection[TupleRow]

# Keys of advisory locks: of all of the store; with a second key, of one user.
STORE_LOCK, USER_LOCKS = 5_050_601, 5_050_602
# How long a writer waits for others, and how long one that does nothing may keep them waiting.
LOCK_SECONDS, IDLE_SECONDS = 10, 10
POOL_SECONDS = 10.0
# SQL: sessions in this database whose snapshot keeps deleted rows.
OLDER_READERS = (
    "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND backend_xmin IS NOT NULL "
    "AND pid != pg_backend_pid() LIMIT 1"
)
# PostgreSQL's text cannot hold this character. In its place is the one that shows it.
NUL, SHOWN_NUL = "\x00", "\u2400"

# Kinds of errors, by their SQLSTATE.
KINDS: dict[str, Literal["full", "damaged", "busy"]] = {
    "53100": "full",
    "XX001": "damaged",
    "XX002": "damaged",
    "55P03": "busy",
    "25P03": "busy",
    "40P01": "busy",
}


def translated(error: psycopg.Error) -> DatabaseError:
    """The store's error for one of PostgreSQL."""
    # Not the details, which quote what users wrote.
    message = error.diag.message_primary or str(error).partition("\n")[0] or type(error).__name__
    return DatabaseError(message, KINDS.get(error.sqlstate or "", "other"))


class PostgresDatabase(Transactions):
    """A migrated database. Raises DataDirectoryError if it cannot be used."""

    SIDE_BY_SIDE = True
    NOW = "extract(epoch FROM clock_timestamp())::float8"
    AMONG = "user IN (SELECT json_array_elements_text(?::json))"
    DAY = "CAST(floor(create_time / 86400) AS BIGINT)"

    def __init__(self, url: str) -> None:
        # The connection of the transaction that is open.
        self._held: Connection | None = None
        conninfo = address.conninfo(url)
        try:
            with psycopg.connect(conninfo, autocommit=True, **SESSIONLESS) as connection:
                upgrade.check_durable(connection)
                self._steps = upgrade.migrate(connection, lock(None))
                self._numbered = upgrade.numbered(connection)
        except psycopg.Error as error:
            raise _unusable(url, error) from error
        self._pool = ConnectionPool(
            conninfo,
            kwargs={"autocommit": True, **SESSIONLESS},
            min_size=1,
            max_size=1,
            timeout=POOL_SECONDS,
            # After that, the next call tries again at once.
            reconnect_timeout=POOL_SECONDS / 2,
            num_workers=1,
            check=ConnectionPool.check_connection,
            open=True,
        )

    def _in_transaction(self) -> bool:
        open_ = (TransactionStatus.INTRANS, TransactionStatus.INERROR)
        return self._held is not None and self._held.info.transaction_status in open_

    def _begin(self) -> None:
        self._release()
        self._held = self._borrow()
        found = self._run(
            self._held,
            f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{LOCK_SECONDS}s'; "
            f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'; {lock(self._users)}; "
            f"SELECT count(*) FROM {upgrade.TABLE}",
        )
        while found.nextset():
            pass
        if found.fetchall() != [(self._steps,)]:
            raise DataDirectoryError("A newer prefloop has migrated the database; restart this process.")

    def _mark(self, sql: str) -> None:
        assert self._held
        self._run(self._held, sql)

    def _commit(self) -> None:
        assert self._held
        # PostgreSQL answers COMMIT by a rollback, without an error, if a statement had failed.
        if self._held.info.transaction_status == TransactionStatus.INERROR:
            raise DatabaseError("A statement of the transaction failed; nothing was stored.")
        super()._commit()

    def _rollback(self) -> None:
        if self._held and self._in_transaction():
            try:
                self._held.execute("ROLLBACK")
            except psycopg.Error:
                self._held.close()
        self._release()

    def settled(self) -> AbstractContextManager[None]:
        """Waits for writers that have drawn numbers, and lets none begin."""
        return self.write()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Everything read inside is from one moment."""
        self._held = self._borrow()
        try:
            self._run(self._held, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield
        finally:
            self._rollback()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement; return the number of rows it changed."""
        with self._connection() as connection:
            return self._run(connection, statement(sql), parameters).rowcount

    def insert(self, table: str, row: Row) -> int:
        """Insert one row; return its number, or 0 in a table whose rows have none."""
        columns, marks = ", ".join(f'"{name}"' for name in row), ", ".join(f"${n + 1}" for n in range(len(row)))
        number = self._numbered.get(table)
        returning = f" RETURNING {number}" if number else ""
        with self._connection() as connection:
            sql = f'INSERT INTO "{table}" ({columns}) VALUES ({marks}){returning}'
            done = self._run(connection, sql, list(row.values()))
            found = done.fetchone() if number else None
            return int(found[0]) if found else 0

    def load(self, table: str, rows: Sequence[Row]) -> None:
        """Insert many rows with their numbers; later rows get greater ones."""
        names = list(rows[0])
        columns = ", ".join(f'"{name}"' for name in names)
        assert self._held, "load rows in a transaction"
        try:
            with self._held.cursor().copy(f'COPY "{table}" ({columns}) FROM STDIN') as copy:
                for row in rows:
                    copy.write_row([storable(row[name]) for name in names])
        except psycopg.Error as error:
            raise translated(error) from error
        if number := self._numbered.get(table):
            sequence, newest = f"pg_get_serial_sequence('{table}', '{number}')", max(row[number] for row in rows)
            self.execute(f"SELECT setval({sequence}, ?)", [newest])

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a SELECT as dictionaries."""
        with self._connection() as connection:
            cursor = self._run(connection, statement(sql), parameters)
            assert cursor.description is not None
            names = [column.name for column in cursor.description]
            found = [dict(zip(names, row, strict=True)) for row in cursor]
        # `*` has it, too.
        for row in found if "rowid" in names else []:
            del row["rowid"]
        return found

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Row | None:
        """The first row of a SELECT, or None."""
        return next(iter(self.rows(sql, parameters)), None)

    def now(self) -> float:
        """Seconds since 1970 by the database's clock."""
        return float(self.rows(f"SELECT {self.NOW} AS now")[0]["now"])

    def rewrite(self) -> bool:
        """Rewrite every table (VACUUM FULL), without what deleted rows left in it. Writers wait. False, and nothing was
        done, while somebody reads an older state: it would be kept, and everybody would wait for the reader."""
        if self.row(OLDER_READERS):
            return False
        for table in self._tables():
            self.execute(f'VACUUM (FULL) "{table}"')
        return True

    def empty_log(self) -> bool:
        """Free what deleted rows took. The write-ahead log, standbys and backups are kept as long as PostgreSQL was
        told to."""
        for table in self._tables():
            self.execute(f'VACUUM "{table}"')
        return True

    def bytes(self) -> int:
        """Size of the database in bytes."""
        return int(self.rows("SELECT pg_database_size(current_database()) AS bytes")[0]["bytes"])

    def close(self) -> None:
        self._rollback()
        self._pool.close()

    def _tables(self) -> list[str]:
        rows = self.rows("SELECT tablename AS name FROM pg_tables WHERE schemaname = current_schema() ORDER BY name")
        return [row["name"] for row in rows]

    def _borrow(self) -> Connection:
        try:
            return self._pool.getconn()
        except PoolTimeout as error:
            raise DatabaseError("PostgreSQL does not answer.", "busy") from error

    def _release(self) -> None:
        """Give the connection back; the pool replaces a broken one."""
        if self._held:
            self._pool.putconn(self._held)
            self._held = None

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """That of the open transaction, or one for a single statement."""
        if self._held:
            yield self._held
            return
        connection = self._borrow()
        try:
            yield connection
        finally:
            self._pool.putconn(connection)

    @staticmethod
    def _run(connection: Connection, sql: str, parameters: Sequence[Any] = ()) -> psycopg.Cursor[TupleRow]:
        try:
            return connection.execute(sql, [storable(value) for value in parameters] or None)
        except psycopg.Error as error:
            raise translated(error) from error


def exists(url: str) -> bool:
    """Whether a server has made its tables there."""
    try:
        with psycopg.connect(address.conninfo(url), autocommit=True) as connection:
            return upgrade.is_store(connection)
    except psycopg.Error as error:
        raise _unusable(url, error) from error


def describe(url: str) -> str:
    """The server's version and place. Raises DataDirectoryError if it cannot be used. Changes nothing."""
    try:
        with psycopg.connect(address.conninfo(url), autocommit=True) as connection:
            upgrade.check_durable(connection)
            number = connection.info.server_version
            return f"PostgreSQL {number // 10_000}.{number % 10_000} at {address.place(url)}"
    except psycopg.Error as error:
        raise _unusable(url, error) from error


def peek(url: str, sql: str) -> str | None:
    """The first value that a query finds; None if there is none, or it cannot be read."""
    try:
        with psycopg.connect(address.conninfo(url), autocommit=True) as connection:
            row = connection.execute(sql.encode()).fetchone()
    except psycopg.Error:
        return None
    return None if row is None else str(row[0])


def _unusable(url: str, error: psycopg.Error) -> DataDirectoryError:
    return DataDirectoryError(f"{address.place(url)} cannot be used: {translated(error)}")


# `$1` as in the protocol; and no named statements, which a pooler's next connection would not know.
SESSIONLESS: dict[str, Any] = {"cursor_factory": psycopg.RawCursor, "prepare_threshold": None}


def storable(value: Any) -> Any:
    """The value, or a text that can be stored in its place."""
    return value.replace(NUL, SHOWN_NUL) if isinstance(value, str) and NUL in value else value


def lock(users: Collection[str] | None) -> str:
    """SQL: wait for the lock on everything, or on what these users' data alone decides. Users' locks are taken in one
    order, so that no two writers wait for each other."""
    if users is None:
        return f"SELECT pg_advisory_xact_lock({STORE_LOCK})"
    keys = sorted({int.from_bytes(hashlib.sha256(user.encode()).digest()[:4], signed=True) for user in users})
    locks = [f"pg_advisory_xact_lock({USER_LOCKS}, {key})" for key in keys]
    return f"SELECT {', '.join([f'pg_advisory_xact_lock_shared({STORE_LOCK})', *locks])}"
