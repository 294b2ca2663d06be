"""The store's interface to a database: durable transactions, and SQL that every database understands.

What differs between databases has a name here: a fragment of SQL, or a method. `server.store.sqlite` and
`server.store.postgres` implement it. Tables need a column `rowid` that grows with every row, and that `*` leaves out;
SQL the functions `uptime()`, in seconds of a clock that cannot be set, and `boot_id()`, which identifies the start of
that clock. Parameters are `?` in their order, or `?1`, `?2`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Row = dict[str, Any]
# As a limit: all rows.
UNLIMITED = 2**62
# The number of parameters of a statement is limited; this is far below.
IDS_PER_QUERY = 500


class Database(Protocol):
    """One connection, for one thread at a time. Every method raises DatabaseError if the database fails."""

    SIDE_BY_SIDE: bool
    """Whether groups of different users' work can go on at the same time; see `group`."""
    NOW: str
    """SQL: seconds since 1970, with fractions."""
    AMONG: str
    """SQL: `user` is in the JSON list bound to the placeholder."""
    DAY: str
    """SQL: the day of `create_time`, counted from 1970; to the letter as in the index `feedback_by_day`."""

    def write(self) -> AbstractContextManager[None]:
        """One transaction that holds the write lock from its first statement; nested calls join the outer one. Atomic,
        and durable when it returns; inside a `group()`, when that returns."""
        ...

    def group(self, users: Collection[str] | None = None) -> AbstractContextManager[None]:
        """Each `write` inside is still atomic, but all become durable by one commit at the end. Raises if that commit
        fails; then none of them was stored.

        With `users`, the writes depend on these users' data alone and change nothing else: other connections may write
        other users' at the same time, where the database can."""
        ...

    def settled(self) -> AbstractContextManager[None]:
        """Inside, no other connection has drawn a number of a row that it has not committed: none that commits later is
        smaller than one that is seen."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """Everything read inside is from one moment."""
        ...

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement; return the number of rows it changed."""
        ...

    def insert(self, table: str, row: Row) -> int:
        """Insert one row; return its rowid."""
        ...

    def load(self, table: str, rows: Sequence[Row]) -> None:
        """Insert many rows with their numbers, in the open transaction; later rows get greater ones."""
        ...

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a SELECT."""
        ...

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> Row | None:
        """The first row of a SELECT, or None."""
        ...

    def now(self) -> float:
        """Seconds since 1970 by the database's clock."""
        ...

    def rewrite(self) -> bool:
        """Remove what deleted rows left in the files; False if that is not possible now. Writers may have to wait."""
        ...

    def empty_log(self) -> bool:
        """Remove what deleted rows left in the database's log; False if others kept reading all the time."""
        ...

    def bytes(self) -> int:
        """Size of the database in bytes."""
        ...

    def close(self) -> None: ...


def pages(ids: Iterable[str | None]) -> Iterator[Sequence[str]]:
    """Yield the distinct non-empty ids in pages of at most IDS_PER_QUERY."""
    distinct = sorted({identifier for identifier in ids if identifier})
    for start in range(0, len(distinct), IDS_PER_QUERY):
        yield distinct[start : start + IDS_PER_QUERY]


def newest_rows(database: Database, table: str, key: str, limit: int, before: str | None) -> list[Row]:
    """Rows, newest first, older than the one whose `key` is `before`. Ordered by rowid, since versions and ids do not
    sort by age (v10000 sorts before v9999)."""
    where = f"WHERE rowid < (SELECT rowid FROM {table} WHERE {key} = ?)" if before else ""
    parameters = [before, limit] if before else [limit]
    return database.rows(f"SELECT * FROM {table} {where} ORDER BY rowid DESC LIMIT ?", parameters)
