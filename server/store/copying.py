"""Copies a store from one database to another, row by row, with every row's number.

What the target has already must be the beginning of what there is to copy: so a copy that was stopped goes on, and one
into another store is refused. At the end both sides are read again and compared, table by table. Left out are
heartbeats, since nobody serves from a copy yet, and the name in shared storage, since what the original has put there
is not the copy's to remove.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from server.shared.errors import ConflictError
from server.store.database import Database, Row

# Each table after those that it references, with the columns that its rows are read in the order of.
TABLES: dict[str, tuple[str, ...]] = {
    "conversations": ("id",),
    "turns": ("seq",),
    "responses": ("rowid",),
    "spans": ("response_id", "start"),
    "comparisons": ("rowid",),
    "requests": ("user", "rpc", "request_id"),
    "feedback": ("id",),
    "feedback_events": ("seq",),
    "policies": ("rowid",),
    "pointer": ("id",),
    "pointer_events": ("seq",),
    "reward_models": ("rowid",),
    "rounds": ("rowid",),
    "shared_versions": ("folder", "version"),
    "leases": ("name",),
    "round_votes": ("round_id", "feedback_id"),
    "keys": ("rowid",),
    "quarantine_events": ("seq",),
    "deletions": ("id",),
    "round_requests": ("id",),
    "reviews": ("seq",),
    "reviewed": ("review_seq", "user"),
    "canaries": ("version",),
    "machine_choices": ("seq",),
    "imports": ("id",),
    "imported_preferences": ("id",),
}
LEFT_OUT = ("replicas", "listeners", "identity", "forgotten")
PAGE = 1_000


class Copied(NamedTuple):
    """A table's progress: how many rows are in the target."""

    table: str
    rows: int


def copy_store(source: Database, target: Database) -> Iterator[Copied]:
    """Copy everything, one transaction after another. `source` must be `reading` or unused. Raises ConflictError if the
    target has other data, or is not the same at the end."""
    for table in TABLES:
        # A new database has this row.
        if table == "deletions":
            with target.write():
                target.execute("DELETE FROM deletions")
        done = _compare(source, target, table)
        yield Copied(table, done)
        rest = _rows(source, table, _last(target, table))
        while page := list(islice(rest, PAGE)):
            with target.write():
                target.load(table, page)
            done += len(page)
            yield Copied(table, done)
    for table in TABLES:
        if _digest(_rows(source, table)) != _digest(_rows(target, table)):
            raise ConflictError(f"The copies of the table {table} are not the same; nothing uses the new one yet.")


def _compare(source: Database, target: Database, table: str) -> int:
    """How many rows the target has. Raises ConflictError if they are not the source's first ones."""
    [found] = target.rows(f"SELECT count(*) AS n FROM {table}")
    count = int(found["n"])
    if _digest(islice(_rows(source, table), count)) != _digest(_rows(target, table)):
        raise ConflictError(f"The target has data of its own in the table {table}; name an empty database.")
    return count


def _digest(rows: Iterator[Row]) -> tuple[int, str]:
    """How many rows there are, and a hash of all."""
    count, digest = 0, hashlib.sha256()
    for row in rows:
        count += 1
        digest.update(repr(sorted((name, _canonical(value)) for name, value in row.items())).encode())
    return count, digest.hexdigest()


def _canonical(value: Any) -> Any:
    """Not all databases can hold this character in a text; see `server.store.postgres`."""
    return value.replace("\x00", "\u2400") if isinstance(value, str) else value


def _last(database: Database, table: str) -> Sequence[Any] | None:
    """The key of the last row; None if there is none."""
    keys = TABLES[table]
    order = ", ".join(f"{key} DESC" for key in keys)
    columns = ", ".join(f"{key} AS key{place}" for place, key in enumerate(keys))
    row = database.row(f"SELECT {columns} FROM {table} ORDER BY {order} LIMIT 1")
    return [row[f"key{place}"] for place in range(len(keys))] if row else None


def _rows(database: Database, table: str, after: Sequence[Any] | None = None) -> Iterator[Row]:
    """The table's rows in order, with their numbers; those after a key."""
    keys = TABLES[table]
    order, marks = ", ".join(keys), ", ".join("?" * len(keys))
    number = ", rowid AS number" if keys == ("rowid",) else ""
    while True:
        where = f"WHERE ({order}) > ({marks})" if after else ""
        page = database.rows(f"SELECT *{number} FROM {table} {where} ORDER BY {order} LIMIT ?", [*(after or ()), PAGE])
        if not page:
            return
        for row in page:
            if number:
                row["rowid"] = row.pop("number")
            yield row
        after = [page[-1][key] for key in keys]
