"""A store goes from one database to the other and back, and everything in it is used as before."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from server.shared.errors import ConflictError, DatabaseError, FailedPreconditionError
from server.store import copying
from server.store.chats.machine_choices import Asked
from server.store.copying import LEFT_OUT, TABLES, Copied
from server.store.learning.imports import ImportedPreference
from server.store.learning.shared_versions import Shared
from server.store.postgres.database import PostgresDatabase
from server.store.store import Store
from tests.postgres import PostgresServer
from tests.server.store.conftest import on_sqlite
from tests.server.store.test_canaries import begin, vote
from tests.server.store.test_store import answer, comparison

pytestmark = on_sqlite


@pytest.fixture
def url(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty database, which the settings do not name yet."""
    url = postgres.create()
    yield url
    postgres.drop(url)


def fill(store: Store) -> None:
    """At least a row in every table."""
    conversation = store.conversations.create("ann", "hello\x00there")
    given = [store.feedback.submit_thumb("ann", answer(store, conversation), up=True) for _ in range(3)]
    store.feedback.retract("ann", given[1].id)
    store.feedback.submit_choice("ann", comparison(store, conversation), "TIE", "a\tcomment\\N")
    store.requests.remember("ann", "Chat", "r1", b"\x00\xff", b"", given[0].response_id)
    canary = begin(store, pairs=4)
    vote(store, "bob", new=True)
    assert canary.version == "v0001"
    lease = store.leases.acquire("learner", "here", -1.0)
    assert lease
    round_ = store.rounds.create(4, {}, reference_version="v0000", fence=lease)
    store.lineage.set_round_votes(round_.id, [(given[0].id, "train")], fence=lease)
    store.reward_models.register("r0001", reference_version="v0000", round_id=round_.id, metrics={"accuracy": 0.5})
    store.rounds.finish(round_.id, "rejected", reason="no better", fence=lease)
    store.shared_versions.claim("policies", "v0001", Shared("policies/v0001-ab", "cd" * 32), fence=lease)
    store.keys.create("ann", "operator")
    store.quarantine.set("ann", actor="bob", reason="too fast")
    store.round_requests.listen("here", None)
    store.round_requests.ask()
    store.round_requests.leave("here")
    pair = store.responses.comparison("ann", store.feedback.page("ann", 1)[0].comparison_id or "")
    store.machine_choices.add(Asked(pair.id, "ann", conversation), "judge", "A", "TIE")
    store.imports.add("pairs", "pairs.jsonl", [ImportedPreference([{"role": "user", "content": "q"}], "yes", "no")] * 3)


def counts(store: Store) -> dict[str, int]:
    return {table: store._db.rows(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in TABLES}


def test_every_table_is_copied_or_left_out_on_purpose(store: Store, url: str, postgres: PostgresServer) -> None:
    in_sqlite = {row["name"] for row in store._db.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
    in_postgres = {
        name for (name,) in postgres.command("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", url)
    }
    assert in_sqlite - {"_sqlite_migrations", "sqlite_sequence"} == {*TABLES, *LEFT_OUT}
    assert in_postgres - {"prefloop_migrations"} == {*TABLES, *LEFT_OUT}


def test_a_store_goes_to_postgresql_and_back(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    before = counts(store)
    assert all(before.values()), before
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    assert list(Store.migrate(tmp_path, "postgres"))[-1] == Copied("imported_preferences", 3)
    with closing(Store.open(tmp_path)) as there:
        assert counts(there) == before
        # New numbers go on from the copied ones, and what was allowed once is not allowed again.
        newest = there.snapshots.watermark()
        conversation = there.conversations.page("ann", 1)[0]
        vote = there.feedback.submit_thumb("ann", answer(there, conversation.id), up=True)
        assert vote.event_seq == newest + 1
        assert there.conversations.page("ann", 10, kinds=("chat",))[0].title == "hello\u2400there"
        assert there.lineage.count_voters(10) == 1  # ann is in quarantine, bob is not
        with pytest.raises(DatabaseError, match="unique"), there.transaction():
            there._db.execute("INSERT INTO pointer (id, version) VALUES (1, 'v0001')")
        after = counts(there)
    with closing(Store(PostgresDatabase(url))) as there:
        assert there.canaries.waiting() == store.canaries.waiting()
    back = tmp_path / "back"
    assert list(Store.migrate(back, "sqlite"))[-1] == Copied("imported_preferences", 3)
    with closing(Store.open_file(back)) as again:
        assert counts(again) == after
        assert again.feedback.page("ann", 1) == [vote]
        assert again.feedback.submit_thumb("ann", str(vote.response_id), up=False).event_seq == newest + 2


@pytest.mark.parametrize("stopped_in", ["conversations", "responses", "feedback_events", "imported_preferences"])
def test_an_interrupted_copy_goes_on(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: str
) -> None:
    fill(store)
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    monkeypatch.setattr(copying, "PAGE", 2)
    copying_ = Store.migrate(tmp_path, "postgres")
    for copied in copying_:
        if copied.table == stopped_in and copied.rows:
            break
    copying_.close()  # type: ignore[attr-defined]
    before = counts(store)
    again = list(Store.migrate(tmp_path, "postgres"))
    # The first line of each table is what was there.
    assert next(one.rows for one in again if one.table == stopped_in) == copied.rows > 0
    with closing(Store.open(tmp_path)) as there:
        assert counts(there) == before


def test_a_database_with_other_data_is_refused(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.conversations.create("ann", "mine")
    with closing(Store(PostgresDatabase(url))) as there:
        there.conversations.create("bob", "theirs")
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    with pytest.raises(ConflictError, match="The target has data of its own in the table conversations"):
        list(Store.migrate(tmp_path, "postgres"))
    with closing(Store(PostgresDatabase(url))) as there:
        assert [one.title for one in there.conversations.page("bob", 10)] == ["theirs"]
        assert there.conversations.page("ann", 10) == []


def test_a_row_that_changed_on_the_way_is_found(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    load = PostgresDatabase.load

    def lie(database: PostgresDatabase, table: str, rows: Any) -> None:
        load(database, table, [{**row, "value": "DOWN"} if table == "feedback" else row for row in rows])

    monkeypatch.setattr(PostgresDatabase, "load", lie)
    with pytest.raises(ConflictError, match="The copies of the table feedback are not the same"):
        list(Store.migrate(tmp_path, "postgres"))


def test_nothing_is_copied_while_a_server_uses_the_store(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.replicas.report("here:50051", "v0000")
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    with pytest.raises(FailedPreconditionError, match="server here:50051 uses the store; stop it first"):
        list(Store.migrate(tmp_path, "postgres"))


def test_a_backup_of_postgresql_is_a_data_directory(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    with closing(Store.open(tmp_path)) as there:
        there.policies.register_reference()
        fill(there)
        before = counts(there)
        (tmp_path / "copy").mkdir()
        there.copy_to(tmp_path / "copy")
    with closing(Store.open_file(tmp_path / "copy")) as copy:
        assert counts(copy) == before
    with closing(sqlite3.connect(tmp_path / "copy" / "prefloop.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
