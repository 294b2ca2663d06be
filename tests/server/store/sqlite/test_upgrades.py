"""Two releases on one data directory, file permissions, and clocks that jump."""

import hashlib
import inspect
import os
import stat
from pathlib import Path

import pytest
import sqlite_utils

from server.shared.errors import DataDirectoryError, advice
from server.store.migrations import known_migrations, migrations
from server.store.sqlite import clock
from server.store.sqlite.database import SqliteDatabase
from server.store.store import Store

# Hashes of each released step's source: a released step is never edited, a later one corrects it.
RELEASED = {
    "m001_chat": "c7cf6ce0b46f2cd3",
    "m002_feedback": "ba60ea662c3faef1",
    "m003_policies": "fa097fb805ccf6ac",
    "m004_planned_answers": "bdee4332f434fc16",
    "m005_lineage": "eb9790ec3239d352",
    "m006_keys": "b78c198a9e5dd6e1",
    "m007_quarantine": "e02a8a5d71f330c6",
    "m008_deletions": "5552cc392626221a",
    "m009_round_requests": "839efd655eb3711d",
    "m010_uptime": "4b06368639862f63",
    "m011_quotas": "a35b883de3682981",
    "m012_reviews": "6ba9765755c827f1",
    "m013_canaries": "1faf2a1b4de30fcb",
    "m014_review_purposes": "20480a71735570d8",
    "m015_stage_of_any_improver": "1ccac380203c8a35",
    "m016_machine_choices": "9def04adb6134575",
    "m017_origins": "3ac9d7192c3c0b1f",
    "m018_kinds_of_round": "189d3b6f2feb0d4f",
    "m019_imports": "429cce2d9badde78",
    "m020_system_prompts": "7988f055a6b921f3",
    "m021_histories": "501e118c82e8f8b4",
    "m022_applications": "0ecfb40d8de12281",
    "m023_pairs": "a614d697125ee9a5",
    "m024_last_looks": "4cadea1c28ade0d2",
    "m025_stops_of_reviews": "cca9a4233a313d86",
    "m026_shared_versions": "acdadb382f1de2e2",
    "m027_forgotten": "daba074b851e6b4c",
}


def sha256(name: str) -> str:
    import server.store.migrations as module

    return hashlib.sha256(inspect.getsource(getattr(module, name)).encode()).hexdigest()[:16]


def test_a_released_step_is_never_edited() -> None:
    assert {name: sha256(name) for name in sorted(known_migrations())} == RELEASED


def older(path: Path, stop_before: str = "m010_uptime") -> sqlite_utils.Database:
    """A database of an older release."""
    database = sqlite_utils.Database(path)
    migrations.apply(database, stop_before=stop_before)
    database.conn.commit()
    return database


def test_missing_indexes_of_released_migrations_are_created(tmp_path: Path) -> None:
    database = older(tmp_path / "prefloop.db")
    for name in ("comparisons_by_time", "keys_revoked", "feedback_by_event"):
        database.execute(f"DROP INDEX {name}")
    database.conn.commit()
    with_all = older(tmp_path / "other.db", stop_before="m999")
    SqliteDatabase(tmp_path / "prefloop.db").close()

    def indexes(database: sqlite_utils.Database) -> set[str]:
        return {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}

    assert indexes(database) == indexes(with_all)


def test_a_round_that_was_stopped_after_ppo_is_in_the_stage_of_that(tmp_path: Path) -> None:
    database = older(tmp_path / "prefloop.db", stop_before="m015_stage_of_any_improver")
    columns = (
        "(id, state, stage, watermark, incumbent_version, reference_version, attempts, settings, metrics, create_time)"
    )
    for name, stage in (("round_1", "ppo"), ("round_2", "gate")):
        values = f"('{name}', 'running', '{stage}', 0, 'v0000', 'v0000', 1, '{{}}', '{{}}', 0)"
        database.execute(f"INSERT INTO rounds {columns} VALUES {values}")
    database.conn.commit()
    SqliteDatabase(tmp_path / "prefloop.db").close()
    assert [*database.execute("SELECT id, stage FROM rounds ORDER BY id")] == [
        ("round_1", "improve"),
        ("round_2", "gate"),
    ]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("INSERT INTO replicas VALUES ('here:50051', 'v0000', '', unixepoch('subsec') - 29)", "server here:50051"),
        ("INSERT INTO listeners VALUES ('here:17:ab', NULL, unixepoch('subsec') - 29)", "learner here:17:ab"),
        ("INSERT INTO leases VALUES ('learner', 'here:18:cd', 1, unixepoch('subsec') + 1)", "learner here:18:cd"),
    ],
)
def test_the_schema_is_not_migrated_while_an_older_process_runs(tmp_path: Path, row: str, named: str) -> None:
    database = older(tmp_path / "prefloop.db")
    database.conn.execute(row)
    database.conn.commit()
    with pytest.raises(
        DataDirectoryError, match=f"in use by an older prefloop, the {named}; stop it, and start this one 30"
    ):
        Store.open(tmp_path)
    database.conn.execute("UPDATE replicas SET heartbeat_time = heartbeat_time - 2")
    database.conn.execute("UPDATE listeners SET heartbeat_time = heartbeat_time - 2")
    database.conn.execute("UPDATE leases SET expire_time = expire_time - 2")
    database.conn.commit()
    Store.open(tmp_path).close()


def test_a_process_does_not_write_to_a_newer_schema(store: Store, tmp_path: Path) -> None:
    newer = sqlite_utils.Database(tmp_path / "prefloop.db")
    newer.conn.execute("ALTER TABLE responses ADD COLUMN colour TEXT")
    newer.conn.execute(
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('prefloop', 'm999_colour', '2099')"
    )
    newer.conn.commit()
    with pytest.raises(DataDirectoryError, match="A newer prefloop has migrated the data directory"):
        store.conversations.create("ann", "Why?")
    assert store.conversations.page("ann", 10) == []


def test_a_rewritten_file_does_not_count_as_a_newer_schema(store: Store, tmp_path: Path) -> None:
    other = SqliteDatabase(tmp_path / "prefloop.db")
    other.rewrite()
    other.close()
    assert store.conversations.create("ann", "Why?").startswith("conv_")


def modes(directory: Path) -> dict[str, str]:
    return {path.name: stat.filemode(path.stat().st_mode) for path in directory.glob("prefloop.db*")}


def test_the_database_is_private_in_a_shared_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0o022)
    try:
        store = Store.open(tmp_path)
        store.conversations.create("ann", "Why?")
        private = "-rw-------"
        assert modes(tmp_path) == {"prefloop.db": private, "prefloop.db-wal": private, "prefloop.db-shm": private}
        store.close()
        # As an earlier release left it; the group's permissions are up to the owner.
        (tmp_path / "prefloop.db").chmod(0o664)
        Store.open(tmp_path).close()
        assert modes(tmp_path)["prefloop.db"] == "-rw-rw----"
    finally:
        os.umask(before)


def test_a_lease_and_a_heartbeat_outlive_a_clock_that_jumps(store: Store) -> None:
    database = store._db
    lease = store.leases.acquire("learner", "first", 30)
    assert lease
    store.replicas.report("here:1", "v0000")
    store.round_requests.listen("here:2", None)
    for jump in (-(10**7), 10**7):
        database.execute("UPDATE leases SET expire_time = expire_time + ?", [jump])
        database.execute("UPDATE replicas SET heartbeat_time = heartbeat_time + ?", [jump])
        database.execute("UPDATE listeners SET heartbeat_time = heartbeat_time + ?", [jump])
        assert store.leases.acquire("learner", "second", 30) is None
        assert store.round_requests.at_work() == "first"
        assert [replica.id for replica in store.replicas.alive()] == ["here:1"]
        assert store.round_requests.next_times() == [None]


def test_after_a_restart_of_the_machine_nothing_is_alive(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    database = store._db
    assert store.leases.acquire("learner", "first", 30)
    store.replicas.report("here:1", "v0000")
    store.round_requests.listen("here:2", None)
    for table in ("leases", "replicas", "listeners"):
        database.execute(f"UPDATE {table} SET boot = 'another'")
    assert store.replicas.alive() == []
    assert store.round_requests.next_times() == []
    second = store.leases.acquire("learner", "second", 30)
    assert second
    assert second.token == 2


def test_this_start_of_the_machine_has_a_name_and_seconds() -> None:
    assert len(clock.boot_id()) in (0, 36)
    assert 0 < clock.uptime() <= clock.uptime()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "free some space on its disk"),
        (OSError(122, "Disk quota exceeded"), "free some space on its disk"),
        (PermissionError(13, "Permission denied"), "give --data-dir a folder that you may write to"),
    ],
)
def test_each_error_of_the_disk_has_its_advice(error: OSError, words: str) -> None:
    assert advice(error) == words


def test_a_file_that_is_not_a_database_is_to_be_restored(tmp_path: Path) -> None:
    (tmp_path / "prefloop.db").write_bytes(b"not a database, and longer than a header of a hundred bytes is" * 40)
    with pytest.raises(DataDirectoryError, match=r"file is not a database\); restore it from a backup"):
        Store.open(tmp_path)
