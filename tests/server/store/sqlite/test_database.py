"""Atomicity, durability, and groups of writes."""

from pathlib import Path

import pytest

from server.shared.errors import DatabaseError
from server.store.sqlite.database import SqliteDatabase


@pytest.fixture
def database(tmp_path: Path) -> SqliteDatabase:
    database = SqliteDatabase(tmp_path / "prefloop.db")
    database.execute("CREATE TABLE notes (text TEXT UNIQUE)")
    return database


def notes(database: SqliteDatabase, tmp_path: Path) -> tuple[list[str], list[str]]:
    """What this connection sees, and what another one sees, which is what was committed."""
    other = SqliteDatabase(tmp_path / "prefloop.db")
    seen = [[row["text"] for row in one.rows("SELECT text FROM notes ORDER BY text")] for one in (database, other)]
    other.close()
    return seen[0], seen[1]


def write(database: SqliteDatabase, *texts: str) -> None:
    with database.write():
        for text in texts:
            database.insert("notes", {"text": text})


def test_a_failed_write_stores_nothing(database: SqliteDatabase, tmp_path: Path) -> None:
    write(database, "a")
    with pytest.raises(DatabaseError):
        write(database, "b", "a")
    assert notes(database, tmp_path) == (["a"], ["a"])


def test_a_group_is_durable_at_its_end_and_not_before(database: SqliteDatabase, tmp_path: Path) -> None:
    with database.group():
        write(database, "a")
        write(database, "b")
        # A read does not need the writer's lock.
        assert [row["text"] for row in database.rows("SELECT text FROM notes")] == ["a", "b"]
    assert notes(database, tmp_path) == (["a", "b"], ["a", "b"])


def test_one_write_of_a_group_fails_alone(database: SqliteDatabase, tmp_path: Path) -> None:
    with database.group():
        write(database, "a")
        with pytest.raises(DatabaseError, match="UNIQUE"):
            write(database, "b", "a")
        write(database, "c")
    assert notes(database, tmp_path) == (["a", "c"], ["a", "c"])


def test_a_group_that_sqlite_rolled_back_raises_and_stores_nothing(database: SqliteDatabase, tmp_path: Path) -> None:
    def group() -> None:
        with database.group():
            write(database, "a")
            with pytest.raises(DatabaseError), database.write():
                # As a full disk does: the whole transaction is rolled back, not only this statement.
                database.execute("INSERT OR ROLLBACK INTO notes VALUES ('a')")
            with pytest.raises(DatabaseError):
                write(database, "c")

    with pytest.raises(DatabaseError, match="UNIQUE"):
        group()
    assert notes(database, tmp_path) == ([], [])


def test_a_group_that_only_reads_takes_no_lock(database: SqliteDatabase, tmp_path: Path) -> None:
    with database.group():
        assert database.rows("SELECT text FROM notes") == []
        other = SqliteDatabase(tmp_path / "prefloop.db")
        write(other, "a")
        other.close()
    assert notes(database, tmp_path) == (["a"], ["a"])
