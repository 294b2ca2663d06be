"""Writers side by side: who waits for whom, and what a watermark means."""

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.shared.errors import DatabaseError
from server.store.postgres import database as module
from server.store.postgres.database import PostgresDatabase
from server.store.store import Store
from tests.postgres import PostgresServer, postgres_server, program
from tests.server.store.postgres.conftest import Connect
from tests.server.store.test_store import answer

SECONDS = 30
EVENT = {"action": "submit", "feedback_id": "fb", "kind": "thumb", "value": "UP", "comment": "", "create_time": 0.0}


def draw(database: PostgresDatabase, user: str) -> int:
    """Draw the next event's number, in the open group."""
    with database.write():
        return database.insert("feedback_events", {**EVENT, "user": user})


def waiting(database: PostgresDatabase) -> int:
    """How many sessions wait for a lock of the store."""
    sql = "SELECT count(*) AS waiting FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    return int(database.rows(sql)[0]["waiting"])


def wait_for_waiting(database: PostgresDatabase, number: int, future: "Future[Any]") -> None:
    deadline = time.monotonic() + SECONDS
    while waiting(database) < number:
        assert not future.done(), future.result()
        assert time.monotonic() < deadline


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@contextmanager
def grouped(database: PostgresDatabase, *users: str) -> Iterator[None]:
    with database.group(users):
        yield


def test_a_watermark_waits_for_a_smaller_number_that_is_committed_later(
    connect: Connect, pool: ThreadPoolExecutor
) -> None:
    first, second, look = connect(), connect(), connect()
    with grouped(first, "ann"):
        assert draw(first, "ann") == 1
        with grouped(second, "bob"):
            assert draw(second, "bob") == 2
        # The second is committed, the first is not: a round that took 2 for its watermark would never learn from it.
        assert [row["seq"] for row in look.rows("SELECT seq FROM feedback_events")] == [2]
        watermark = pool.submit(Store(connect()).snapshots.watermark)
        wait_for_waiting(look, 1, watermark)
    assert watermark.result(SECONDS) == 2
    assert [row["seq"] for row in look.rows("SELECT seq FROM feedback_events ORDER BY seq")] == [1, 2]


def test_a_writer_that_stops_before_its_commit_is_given_up(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 1)
    stopped, other = connect(), Store(connect())

    def group() -> None:
        with grouped(stopped, "ann"):
            assert draw(stopped, "ann") == 1
            # Waits until PostgreSQL has ended the writer's session, then goes on without its number.
            assert other.snapshots.watermark() == 0

    with pytest.raises(DatabaseError, match=r"idle-in-transaction|closed|terminating"):
        group()
    assert other.snapshots.watermark() == 0
    with other.transaction():
        assert draw(other._db, "ann") == 2  # type: ignore[arg-type]
    assert other.snapshots.watermark() == 2
    # The connection of the one that stopped is replaced.
    with grouped(stopped, "ann"):
        assert draw(stopped, "ann") == 3


def test_who_waits_too_long_is_told_so(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 1)
    holder, other = connect(), connect()
    with holder.write():
        draw(holder, "ann")
        with pytest.raises(DatabaseError) as refused, grouped(other, "bob"):
            draw(other, "bob")
    assert (refused.value.kind, str(refused.value)) == ("busy", "canceling statement due to lock timeout")


def test_writes_of_different_users_go_on_side_by_side_and_of_one_user_one_by_one(
    connect: Connect, pool: ThreadPoolExecutor
) -> None:
    first, second, look = connect(), connect(), connect()

    def write(user: str) -> int:
        with grouped(second, user):
            return draw(second, user)

    with grouped(first, "ann", "eve"):
        draw(first, "ann")
        assert pool.submit(write, "bob").result(SECONDS) == 2
        again = pool.submit(write, "eve")
        wait_for_waiting(look, 1, again)
    assert again.result(SECONDS) == 3


def test_a_write_that_may_depend_on_anything_is_alone(connect: Connect, pool: ThreadPoolExecutor) -> None:
    alone, users, look = connect(), connect(), connect()

    def write(*of: str) -> int:
        with grouped(users, *of) if of else alone.write():
            return draw(users if of else alone, "ann")

    with alone.write():
        draw(alone, "ann")
        later = pool.submit(write, "bob")
        wait_for_waiting(look, 1, later)
    assert later.result(SECONDS) == 2
    with grouped(users, "bob"):
        draw(users, "bob")
        later = pool.submit(write)
        wait_for_waiting(look, 1, later)
    assert later.result(SECONDS) == 4


def test_groups_of_many_users_never_wait_in_a_circle(connect: Connect, pool: ThreadPoolExecutor) -> None:
    databases = [connect(), connect()]
    users = [f"user{number}" for number in range(20)]

    def write(database: PostgresDatabase, order: list[str]) -> None:
        for _ in range(50):
            with grouped(database, *order):
                draw(database, order[0])

    both = [pool.submit(write, databases[0], users), pool.submit(write, databases[1], users[::-1])]
    for one in both:
        one.result(SECONDS)
    assert databases[0].rows("SELECT count(*) AS n FROM feedback_events") == [{"n": 100}]


def test_a_dump_is_restored_into_a_fresh_cluster_and_goes_on(url: str, tmp_path: Path) -> None:
    store = Store(PostgresDatabase(url))
    store.policies.register_reference()
    conversation = store.conversations.create("ann", "hello")
    vote = store.feedback.submit_thumb("ann", answer(store, conversation), up=True)
    store.close()
    dump = subprocess.run([program("pg_dump"), url], check=True, capture_output=True, timeout=SECONDS).stdout
    with postgres_server() as fresh:
        there = fresh.create(migrated=False)
        restore = [program("psql"), "--quiet", "--set", "ON_ERROR_STOP=1", "--single-transaction", there]
        subprocess.run(restore, input=dump, check=True, capture_output=True, timeout=SECONDS)
        again = Store(PostgresDatabase(there))
        assert again.feedback.page("ann", 10) == [vote]
        assert again.snapshots.watermark() == vote.event_seq == 1
        assert again.feedback.submit_thumb("ann", answer(again, conversation), up=False).event_seq == 2
        assert again.policies.active().version == "v0000"
        again.close()


def test_two_processes_that_open_an_empty_database_at_once_make_its_tables_once(
    postgres: PostgresServer, pool: ThreadPoolExecutor
) -> None:
    empty = postgres.create(migrated=False)
    for database in pool.map(PostgresDatabase, [empty] * 4):
        database.close()
    assert postgres.command("SELECT count(*), count(DISTINCT name) FROM prefloop_migrations", empty) == [(27, 27)]
    postgres.drop(empty)
