"""Opens a database for this release: is it durable, and has it all steps of the schema?"""

from types import SimpleNamespace
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from server.shared.errors import DataDirectoryError
from server.store.migrations import steps
from server.store.postgres.dialect import schema
from server.store.upgrades import SIGN_SECONDS, check

TABLE = "prefloop_migrations"
OLDEST = 140_000
# What leases and heartbeats go by; see `server.store.database`.
FUNCTIONS = """
CREATE TABLE IF NOT EXISTS prefloop_migrations (name TEXT PRIMARY KEY, apply_time TIMESTAMPTZ NOT NULL DEFAULT now());
CREATE OR REPLACE FUNCTION uptime() RETURNS float8 LANGUAGE sql AS
    'SELECT extract(epoch FROM clock_timestamp())::float8';
CREATE OR REPLACE FUNCTION boot_id() RETURNS text LANGUAGE sql AS $$SELECT ''$$
"""
ALIVE = """
SELECT 'server ' || id FROM replicas WHERE uptime() - uptime <= {seconds} UNION ALL
SELECT 'learner ' || id FROM listeners WHERE uptime() - uptime <= {seconds} UNION ALL
SELECT 'learner ' || holder FROM leases WHERE expire_uptime > uptime() LIMIT 1
"""

Connection = psycopg.Connection[TupleRow]


def check_durable(connection: Connection) -> None:
    """Raise DataDirectoryError if a commit that PostgreSQL acknowledges could be lost, or it is too old."""
    if connection.info.server_version < OLDEST:
        raise DataDirectoryError(f"PostgreSQL is older than {OLDEST // 10_000}.")
    for name in ("synchronous_commit", "fsync"):
        [value] = connection.execute(f"SHOW {name}").fetchone() or ("",)
        if value == "off":
            raise DataDirectoryError(f"PostgreSQL runs with {name} = off, so acknowledged votes could be lost.")


def migrate(connection: Connection, lock: str) -> int:
    """Apply the steps that are missing, one process at a time; returns how many there are. Raises DataDirectoryError if
    a newer release has been here, or an older one still runs."""
    known = steps()
    # Most often there is nothing to do, and no writer to wait for.
    if is_store(connection) and _applied(connection) == known.keys():
        return len(known)
    with connection.transaction():
        connection.execute(lock)
        connection.execute(FUNCTIONS)
        applied = _applied(connection)
        check("The database", applied, set(known), lambda: _alive(connection))
        for name in (name for name in known if name not in applied):
            known[name](_as_sqlite(connection))
            connection.execute(f"INSERT INTO {TABLE} (name) VALUES ($1)", [name])
    return len(known)


def is_store(connection: Connection) -> bool:
    """Whether a server has made its tables there."""
    [found] = connection.execute(f"SELECT to_regclass('{TABLE}')").fetchone() or (None,)
    return found is not None


def numbered(connection: Connection) -> dict[str, str]:
    """By table, the column that numbers its rows."""
    rows = connection.execute(
        "SELECT table_name, column_name FROM information_schema.columns "
        "WHERE table_schema = current_schema() AND is_identity = 'YES'"
    )
    return {str(table): str(column) for table, column in rows}


def _applied(connection: Connection) -> set[str]:
    return {str(name) for (name,) in connection.execute(f"SELECT name FROM {TABLE}")}


def _alive(connection: Connection) -> str | None:
    """A server or learner that is alive, or None."""
    row = connection.execute(ALIVE.format(seconds=SIGN_SECONDS)).fetchone()
    return str(row[0]) if row else None


def _as_sqlite(connection: Connection) -> Any:
    """What the steps use of an SQLite connection."""

    def execute(sql: str, parameters: Any = None) -> Any:
        return connection.execute(schema(sql), parameters)

    def query(sql: str) -> list[dict[str, Any]]:
        found = execute(sql)
        names = [column.name for column in found.description or []]
        return [dict(zip(names, row, strict=True)) for row in found]

    return SimpleNamespace(conn=SimpleNamespace(execute=execute), query=query)
