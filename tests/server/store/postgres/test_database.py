"""What is refused, what is not said, and what lies between: other settings, other releases, and a pooler."""

from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from server.shared.errors import DatabaseError, DataDirectoryError
from server.store.chats.records import Generation
from server.store.postgres.address import conninfo, place
from server.store.postgres.database import PostgresDatabase, exists, peek
from server.store.store import Store
from tests.pem import make_pem
from tests.postgres import PostgresServer, postgres_server
from tests.server.store.postgres.conftest import Connect
from tests.server.store.postgres.pooler import pooler
from tests.server.store.test_store import answer


@pytest.mark.parametrize("name", ["synchronous_commit", "fsync"])
def test_a_server_that_may_lose_what_it_acknowledged_is_refused(name: str) -> None:
    with postgres_server(f"{name}=off") as server, pytest.raises(DataDirectoryError) as refused:
        PostgresDatabase(server.url())
    assert str(refused.value) == f"PostgreSQL runs with {name} = off, so acknowledged votes could be lost."


def test_the_users_own_setting_counts_too(url: str, postgres: PostgresServer) -> None:
    with pytest.raises(DataDirectoryError, match="synchronous_commit = off"):
        PostgresDatabase(url + "&options=-csynchronous_commit%3Doff")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://ann@db.example/p", {"sslmode": "verify-full", "sslrootcert": "system"}),
        ("postgresql://db.example/p?sslmode=verify-ca", {"sslmode": "verify-ca", "sslrootcert": None}),
        ("postgresql://db.example/p?sslrootcert=/ca.pem", {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}),
        ("postgresql://localhost,127.0.0.2/p", {"sslmode": None, "sslrootcert": None}),
        ("postgresql://[::1]/p?sslmode=disable", {"sslmode": "disable", "sslrootcert": None}),
        ("postgresql:///p?host=/run/postgresql", {"sslmode": None, "sslrootcert": None}),
        ("host=10.0.0.7 dbname=p", {"sslmode": "verify-full", "sslrootcert": "system"}),
        ("postgresql://localhost,db.example/p", {"sslmode": "verify-full", "sslrootcert": "system"}),
    ],
)
def test_beyond_loopback_the_server_is_verified(url: str, expected: dict[str, Any]) -> None:
    found = conninfo_to_dict(conninfo(url))
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require"])
def test_an_unverified_connection_beyond_loopback_is_refused(mode: str) -> None:
    with pytest.raises(DataDirectoryError, match=f"sslmode={mode} beyond loopback; use verify-full or verify-ca"):
        conninfo(f"postgresql://db.example/p?sslmode={mode}")


def test_a_certificate_of_another_authority_is_refused(url: str, postgres: PostgresServer, tmp_path: Path) -> None:
    ours, theirs = make_pem(tmp_path, "ours"), make_pem(tmp_path, "theirs")
    # This PostgreSQL is built without TLS; the pooler's is the same to libpq.
    with pooler(postgres, ours) as pool:
        verified = f"{pool.url(url, host='localhost')}?sslmode=verify-full&sslrootcert="
        PostgresDatabase(f"{verified}{ours.certificate}").close()
        with pytest.raises(DataDirectoryError, match="certificate verify failed"):
            PostgresDatabase(f"{verified}{theirs.certificate}")


def test_no_message_has_the_password(postgres: PostgresServer) -> None:
    secret = "hunter2-and-more"
    for url in (
        f"postgresql://ann:{secret}@localhost:1/p",
        f"postgresql://ann:{secret}@db.example/p?sslmode=disable",
        f"postgresql://ann:{secret}@localhost/p?nonsense=1",
        f"postgres:ann:{secret}",
        f"postgresql://ann:x/{secret}@db.example/p",
        f"postgresql://ann:x@{secret}@db.example/p",
    ):
        with pytest.raises(DataDirectoryError) as refused:
            PostgresDatabase(url)
        assert secret not in str(refused.value)
    assert place(f"postgresql://ann:{secret}@localhost:5433/p") == "postgresql://localhost:5433/p"


def test_a_message_does_not_quote_what_users_wrote(connect: Connect) -> None:
    database = connect()
    row = {"id": "conv_1", "user": "ann", "title": "my secret", "create_time": 0.0, "update_time": 0.0}
    with database.write():
        database.insert("conversations", row)
    with pytest.raises(DatabaseError) as refused, database.write():
        database.insert("conversations", {**row, "title": "another secret"})
    assert str(refused.value) == 'duplicate key value violates unique constraint "conversations_pkey"'


def test_what_text_cannot_hold_is_shown_in_its_place(url: str) -> None:
    store = Store(PostgresDatabase(url))
    response = answer(
        store, store.conversations.create("ann", "a\x00b"), generation=Generation([5], [-1.0], "\x00", "stop", [])
    )
    assert store.responses.get("ann", response).text == "\u2400"
    assert store.conversations.page("ann", 1)[0].title == "a\u2400b"
    store.close()


def test_a_newer_database_is_refused_and_one_that_was_opened_before_it_was(
    url: str, connect: Connect, postgres: PostgresServer
) -> None:
    store = Store(connect())
    postgres.command("INSERT INTO prefloop_migrations (name) VALUES ('m999_later')", url)
    with pytest.raises(DataDirectoryError, match=r"written by a newer prefloop \(m999_later\)"):
        PostgresDatabase(url)
    with pytest.raises(DataDirectoryError, match="A newer prefloop has migrated the database; restart this process"):
        store.conversations.create("ann", "hello")
    assert store.conversations.page("ann", 10) == []


def test_the_schema_is_not_migrated_while_an_older_process_runs(
    url: str, connect: Connect, postgres: PostgresServer
) -> None:
    store = Store(connect())
    store.replicas.report("here:50051", "v0000")
    postgres.command("DELETE FROM prefloop_migrations WHERE name = 'm015_stage_of_any_improver'", url)
    with pytest.raises(DataDirectoryError, match="in use by an older prefloop, the server here:50051; stop it"):
        PostgresDatabase(url)
    postgres.command("UPDATE replicas SET uptime = uptime - 31", url)
    PostgresDatabase(url).close()
    assert postgres.command("SELECT count(*) FROM prefloop_migrations", url) == [(27,)]


def test_an_empty_database_is_no_store_and_stays_empty(postgres: PostgresServer) -> None:
    empty = postgres.create(migrated=False)
    assert not exists(empty)
    assert peek(empty, "SELECT version FROM pointer") is None
    assert postgres.command("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", empty) == [(0,)]
    PostgresDatabase(empty).close()
    assert exists(empty)
    postgres.drop(empty)


def test_a_deletion_leaves_nothing_in_the_tables_files(url: str, postgres: PostgresServer) -> None:
    secret = b"xylophone in the cellar"
    store = Store(PostgresDatabase(url))
    conversation = store.conversations.create("ann", secret.decode())
    for _ in range(30):
        given = answer(store, conversation, generation=Generation([5], [-1.0], secret.decode() * 20, "stop", []))
        store.feedback.submit_thumb("ann", given, up=True, comment=secret.decode())

    def left() -> int:
        postgres.command("CHECKPOINT")
        [(number,)] = postgres.command("SELECT oid FROM pg_database WHERE datname = current_database()", url)
        files = (postgres.folder / "data" / "base" / str(number)).iterdir()
        return sum(file.read_bytes().count(secret) for file in files)

    assert left() > 30
    while store.deletion.step("ann"):
        pass
    assert store.free_files(rewrite=True)
    assert left() == 0
    store.close()


def test_the_store_works_behind_a_transaction_pooler(url: str, postgres: PostgresServer) -> None:
    with pooler(postgres) as pool:
        stores = [Store(PostgresDatabase(pool.url(url))) for _ in range(4)]
        for turn in range(20):
            store = stores[turn % 4]
            conversation = store.conversations.create("ann", f"hello {turn}")
            with store.group(["ann"]):
                store.feedback.submit_thumb("ann", answer(store, conversation), up=True)
            with store.reading():
                assert len(store.feedback.page("ann", 100)) == turn + 1
        assert stores[0].snapshots.watermark() == 20
        for store in stores:
            store.close()


@pytest.mark.parametrize(("name", "value"), [("PGHOST", "db.example"), ("PGHOSTADDR", "10.0.0.7")])
def test_a_host_from_the_environment_is_verified_too(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert conninfo_to_dict(conninfo("postgresql:///p"))["sslmode"] == "verify-full"


def test_a_service_file_may_not_say_where_the_store_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataDirectoryError, match="a service file may name any"):
        conninfo("postgresql:///p?service=prod")
    monkeypatch.setenv("PGSERVICE", "prod")
    with pytest.raises(DataDirectoryError, match="a service file may name any"):
        conninfo("postgresql:///p")


def test_nothing_is_rewritten_under_an_older_reader(url: str, connect: Connect) -> None:
    store, reader = Store(connect()), connect()
    conversation = store.conversations.create("ann", "secret")
    with reader.reading():
        assert len(reader.rows("SELECT id FROM conversations")) == 1
        store.conversations.delete("ann", conversation)
        assert not store.free_files(rewrite=True)
        assert store.deletion.rewrite_due() > 0
    assert store.free_files(rewrite=True)
    assert store.deletion.rewrite_due() == 0


def test_a_group_on_a_newer_database_stores_nothing_of_any_of_its_writes(
    url: str, connect: Connect, postgres: PostgresServer
) -> None:
    store = Store(connect())
    postgres.command("INSERT INTO prefloop_migrations (name) VALUES ('m999_later')", url)

    def group() -> None:
        with store.group():
            for _ in range(2):
                with pytest.raises(DataDirectoryError, match="A newer prefloop has migrated"):
                    store.conversations.create("ann", "hello")

    with pytest.raises(DataDirectoryError, match="A newer prefloop has migrated"):
        group()
    assert store.conversations.page("ann", 10) == []
