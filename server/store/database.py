"""What the store needs of a database: a transaction that is on disk when it ends, and SQL that every database reads.

What differs between databases is here under a name: a fragment of SQL, or a method. `server.store.sqlite` has the one
that there is. Its tables have a column `rowid` that grows with every row, and its SQL the functions `uptime()`, in
seconds of a clock that nobody sets, and `boot_id()`, which says which start of that clock it was.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
# As a limit: all rows.
UNLIMITED = 2**62
# A statement takes only so many parameters; a page of ids stays far below.
IDS_PER_QUERY = 500


class Database(Protocol):
    """One connection, for one thread at a time. Every method raises DatabaseError where the database fails."""

    NOW: str
    """SQL: seconds since 1970, with fractions."""
    AMONG: str
    """SQL: `user` is one of those in the JSON list that is bound to the mark."""

    def write(self) -> AbstractContextManager[None]:
        """One transaction that holds the write lock from its first statement; nested calls join the outer one. Atomic,
        and durable when it returns; inside a `group()`, when that returns."""
        ...

    def group(self) -> AbstractContextManager[None]:
        """Each `write` inside is still atomic, but all become durable by one commit, at the end. Raises where that
        commit fails: then none of them was kept."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """All that is read inside is as of one moment."""
        ...

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Runs one statement; returns the number of rows it changed."""
        ...

    def insert(self, table: str, row: Row) -> int:
        """Inserts one row; returns its rowid."""
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

    def rewrite(self) -> None:
        """Frees the files of what deleted rows left in them. Writers may have to wait."""
        ...

    def empty_log(self) -> bool:
        """Frees the database's log of what deleted rows left in it; False where others kept reading all the time."""
        ...

    def bytes(self) -> int:
        """How much it takes up."""
        ...

    def copy_to(self, path: Path) -> None:
        """Makes the file `path` a copy as of one moment, while others write. Raises DataDirectoryError where it is
        damaged. Not durable until the caller syncs it."""
        ...

    def close(self) -> None: ...


def pages(ids: Iterable[str | None]) -> Iterator[Sequence[str]]:
    """The distinct ids, none left out but those that are empty, so many at a time as one statement takes."""
    distinct = sorted({identifier for identifier in ids if identifier})
    for start in range(0, len(distinct), IDS_PER_QUERY):
        yield distinct[start : start + IDS_PER_QUERY]


def newest_rows(database: Database, table: str, key: str, limit: int, before: str | None) -> list[Row]:
    """Rows, newest first, that come after the one whose `key` is `before`. By rowid: versions and ids have no order of
    their own (v10000 sorts before v9999)."""
    where = f"WHERE rowid < (SELECT rowid FROM {table} WHERE {key} = ?)" if before else ""
    parameters = [before, limit] if before else [limit]
    return database.rows(f"SELECT * FROM {table} {where} ORDER BY rowid DESC LIMIT ?", parameters)
