"""Calls from the event loop: each gets its own outcome, after a commit that may be shared."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.shared.errors import DatabaseError, NotFoundError
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.store.transactions import Transactions


@pytest.fixture
async def thread(tmp_path: Path) -> AsyncIterator[StoreThread]:
    thread = StoreThread(tmp_path)
    yield thread
    await thread.close()


def titles(data_dir: Path) -> list[str]:
    """What another process sees on disk."""
    other = Store.open(data_dir)
    found = sorted(conversation.title for conversation in other.conversations.page("ann", 100))
    other.close()
    return found


async def test_each_call_of_a_group_gets_its_own_outcome(thread: StoreThread, tmp_path: Path) -> None:
    outcomes = await asyncio.gather(
        thread(lambda store: store.conversations.create("ann", "one")),
        thread(lambda store: store.conversations.get("ann", "conv_none")),
        thread(lambda store: store.conversations.create("ann", "two")),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], str)
    assert isinstance(outcomes[1], NotFoundError)
    assert isinstance(outcomes[2], str)
    assert titles(tmp_path) == ["one", "two"]


async def test_calls_share_a_commit(thread: StoreThread, monkeypatch: pytest.MonkeyPatch) -> None:
    commits, commit = [], Transactions._commit
    monkeypatch.setattr(Transactions, "_commit", lambda database: (commits.append(1), commit(database)))
    await asyncio.gather(*(thread(lambda store: store.conversations.create("ann", "hello")) for _ in range(20)))
    assert len(commits) == 1


async def test_success_is_not_reported_without_a_commit(thread: StoreThread, tmp_path: Path, database: str) -> None:
    def lose(store: Store) -> None:
        """As a full disk does with SQLite's transaction, and a lost connection with PostgreSQL's."""
        with store.transaction():
            if database == "postgres":
                store._db.rows("SELECT pg_terminate_backend(pg_backend_pid())")
            store._db.execute("CREATE TABLE one (id INTEGER PRIMARY KEY)")
            store._db.execute("INSERT INTO one VALUES (1)")
            store._db.execute("INSERT OR ROLLBACK INTO one VALUES (1)")

    outcomes = await asyncio.gather(
        thread(lambda store: store.conversations.create("ann", "before")),
        thread(lose),
        thread(lambda store: store.conversations.create("ann", "after")),
        return_exceptions=True,
    )
    assert [isinstance(outcome, DatabaseError) for outcome in outcomes] == [True, True, True]
    assert titles(tmp_path) == []
    # The thread continues.
    await thread(lambda store: store.conversations.create("ann", "later"))
    assert titles(tmp_path) == ["later"]


async def test_cancelling_a_caller_does_not_affect_its_work_or_others(thread: StoreThread, tmp_path: Path) -> None:
    cancelled = asyncio.create_task(thread(lambda store: store.conversations.create("ann", "cancelled")))
    other = asyncio.create_task(thread(lambda store: store.conversations.create("ann", "other")))
    await asyncio.sleep(0)  # both have asked
    cancelled.cancel()
    await other
    assert titles(tmp_path) == ["cancelled", "other"]


async def test_close_waits_for_earlier_work(tmp_path: Path) -> None:
    thread = StoreThread(tmp_path)
    asking = asyncio.create_task(thread(lambda store: store.conversations.create("ann", "last")))
    await asyncio.sleep(0)
    await thread.close()
    await asking
    assert titles(tmp_path) == ["last"]


async def test_a_call_after_the_close_raises(tmp_path: Path) -> None:
    thread = StoreThread(tmp_path)
    await thread.close()
    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError):
            await thread(lambda store: store.conversations.create("ann", "late"))


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("where", ["a read", "before a write", "at the end of a write"])
async def test_a_connection_that_is_lost_anywhere_takes_all_of_its_group_with_it(
    thread: StoreThread, tmp_path: Path, where: str
) -> None:
    def end_session(store: Store) -> None:
        with contextlib.suppress(DatabaseError):
            store._db.rows("SELECT pg_terminate_backend(pg_backend_pid())")

    def lose(store: Store) -> str:
        if where == "at the end of a write":
            with store.transaction():
                end_session(store)
            return "stored"
        end_session(store)
        return store.conversations.create("ann", "middle") if where == "before a write" else "read"

    outcomes = await asyncio.gather(
        thread(lambda store: store.conversations.create("ann", "before"), "ann"),
        thread(lose, "ann"),
        thread(lambda store: store.conversations.create("ann", "after"), "ann"),
        return_exceptions=True,
    )
    assert [isinstance(outcome, DatabaseError) for outcome in outcomes] == [True, True, True], outcomes
    assert titles(tmp_path) == []
    await thread(lambda store: store.conversations.create("ann", "later"), "ann")
    assert await thread(lambda store: [one.title for one in store.conversations.page("ann", 10)]) == ["later"]


async def test_work_of_no_single_user_comes_after_all_that_was_asked_before(thread: StoreThread) -> None:
    names = [f"user{number}" for number in range(20)]
    asked = [thread(lambda store, name=name: store.conversations.create(name, "hi"), name) for name in names]
    tasks = [asyncio.create_task(one) for one in asked]
    await asyncio.sleep(0)  # all have asked
    found = await thread(lambda store: [store.conversations.count(name) for name in names])
    assert found == [1] * 20
    await asyncio.gather(*tasks)
