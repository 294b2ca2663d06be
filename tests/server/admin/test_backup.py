"""Backups: they have every vote acknowledged before and every version in their database, or do not exist at all."""

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from server.admin import backup
from server.admin.backup import back_up
from server.shared.errors import DataDirectoryError
from server.store.files.manifest import Manifest, verify
from server.store.store import Store
from tests.server.conftest import publish_version, register
from tests.server.store.test_store import answer


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """v0000 is active, v0001 exists, and ann has voted once."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    with closing(Store.open(data_dir)) as store:
        for version in ("v0000", "v0001"):
            publish_version(data_dir, version)
        store.policies.register_reference()
        register(store, "v0001")
        vote(store)
    return data_dir


def vote(store: Store) -> str:
    return store.feedback.submit_thumb("ann", answer(store, store.conversations.create("ann", "hello")), up=True).id


def votes(data_dir: Path) -> list[str]:
    """The votes in the order in which they were given."""
    with closing(Store.open(data_dir)) as store:
        return [thumb.feedback_id for thumb in store.snapshots.take().thumbs]


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@contextmanager
def voting(data_dir: Path) -> Iterator[list[str]]:
    """A user votes continuously; yields the acknowledged votes so far."""
    acknowledged: list[str] = []
    first, stop = threading.Event(), threading.Event()

    def run() -> None:
        with closing(Store.open(data_dir)) as store:
            while not stop.is_set():
                acknowledged.append(vote(store))
                first.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert first.wait(30)
        yield acknowledged
    finally:
        stop.set()
        thread.join()


def test_a_backup_during_votes_has_all_earlier_ones_as_of_one_moment(data_dir: Path, tmp_path: Path) -> None:
    [earlier] = votes(data_dir)
    with voting(data_dir) as acknowledged:
        before = len(acknowledged)
        assert back_up(data_dir, tmp_path / "copy") == []
        during = len(acknowledged)
    kept = votes(tmp_path / "copy")
    assert 1 + before <= len(kept) <= 1 + during + 1
    assert kept == [earlier, *acknowledged][: len(kept)]
    with closing(sqlite3.connect(tmp_path / "copy" / "prefloop.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert [verify(tmp_path / "copy" / "policies" / version).version for version in ("v0000", "v0001")] == [
        "v0000",
        "v0001",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "data"]


def test_a_backup_has_only_the_database_and_the_versions(data_dir: Path, tmp_path: Path) -> None:
    publish_version(data_dir, "v0002")  # Not registered: left by a round that was killed then.
    for derived in ("merged/v0001", "cache", "rounds/round_1"):
        (data_dir / derived).mkdir(parents=True)
        (data_dir / derived / "file").write_text("")
    back_up(data_dir, tmp_path / "copy")
    assert files(tmp_path / "copy") == [
        "policies/v0000/manifest.json",
        "policies/v0000/model.safetensors",
        "policies/v0001/manifest.json",
        "policies/v0001/model.safetensors",
        "prefloop.db",
    ]
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o700


def test_a_running_round_fails_in_the_backup_and_continues_in_the_original(data_dir: Path, tmp_path: Path) -> None:
    with closing(Store.open(data_dir)) as store:
        lease = store.leases.acquire("learner", "here", 60)
        assert lease
        round_id = store.rounds.create(1, {}, reference_version="v0000", fence=lease).id
        back_up(data_dir, tmp_path / "copy")
        assert store.rounds.get(round_id).state == "running"
    with closing(Store.open(tmp_path / "copy")) as copy:
        failed = copy.rounds.get(round_id)
        assert (failed.state, failed.reason) == ("failed", "It was in progress when this backup was made.")
        assert copy.rounds.running() is None


def test_a_backup_shares_nothing_with_the_original(data_dir: Path, tmp_path: Path) -> None:
    back_up(data_dir, tmp_path / "copy")
    (data_dir / "policies" / "v0001" / "model.safetensors").write_bytes(b"")
    assert verify(tmp_path / "copy" / "policies" / "v0001").version == "v0001"


def on_copying(monkeypatch: pytest.MonkeyPatch, wanted: str, act: Callable[[], None]) -> None:
    """Act once, right after the version `wanted` was copied."""
    todo = [act]

    def then(directory: Path) -> Manifest:
        manifest = verify(directory)
        if directory.name == wanted and todo:
            todo.pop()()
        return manifest

    monkeypatch.setattr(backup, "verify", then)


def test_a_version_published_during_the_backup_is_copied(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish() -> None:
        with closing(Store.open(data_dir)) as store:
            publish_version(data_dir, "v0002")
            register(store, "v0002")
            store.policies.activate("v0002", actor="learner")

    on_copying(monkeypatch, "v0001", publish)
    assert back_up(data_dir, tmp_path / "copy") == []
    with closing(Store.open(tmp_path / "copy")) as store:
        assert store.policies.active().version == "v0002"
    assert verify(tmp_path / "copy" / "policies" / "v0002").version == "v0002"


def test_a_version_pruned_during_the_backup_is_not_required(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune() -> None:
        with closing(Store.open(data_dir)) as store:
            assert store.policies.prune("v0001")
        shutil.rmtree(data_dir / "policies" / "v0001")

    on_copying(monkeypatch, "v0000", prune)
    assert back_up(data_dir, tmp_path / "copy") == []
    assert [path.name for path in (tmp_path / "copy" / "policies").iterdir()] == ["v0000"]
    with closing(Store.open(tmp_path / "copy")) as store:
        assert store.policies.get("v0001").prune_time is not None


def test_a_damaged_version_is_left_out_and_reported(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "policies" / "v0001" / "model.safetensors").write_bytes(b"other")
    assert back_up(data_dir, tmp_path / "copy") == [
        "v0001/model.safetensors does not have the SHA-256 that its manifest lists."
    ]
    assert [path.name for path in (tmp_path / "copy" / "policies").iterdir()] == ["v0000"]
    assert len(votes(tmp_path / "copy")) == 1


def test_a_damaged_database_makes_no_backup(data_dir: Path, tmp_path: Path) -> None:
    with closing(Store.open(data_dir)) as store:
        for _ in range(50):
            vote(store)
    with (data_dir / "prefloop.db").open("r+b") as file:
        # Pages of tables and indexes after the schema, which is read when the database is opened.
        file.seek(40 * 4096)
        file.write(b"\xff" * 8 * 4096)
    with pytest.raises(DataDirectoryError, match=r"damaged|malformed"):
        back_up(data_dir, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "server.cli", "backup", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_command(data_dir: Path, tmp_path: Path) -> None:
    copy, source = str(tmp_path / "copy"), ("--data-dir", str(data_dir))
    assert run(copy, *source) == (0, f"backed up to {copy}\n")
    assert run(copy, *source) == (1, f"server: '{copy}' exists already; a backup never overwrites anything.\n")
    nothing = str(tmp_path / "nothing")
    assert run(str(tmp_path / "b"), "--data-dir", nothing) == (
        1,
        f"server: There is no data in '{nothing}' to back up.\n",
    )
    assert not (tmp_path / "nothing").exists()
    shutil.rmtree(data_dir / "policies" / "v0001")
    status, said = run(str(tmp_path / "less"), *source)
    assert status == 1
    assert said.startswith(
        f"backed up to {tmp_path / 'less'}\n"
        "server: The backup is incomplete: damaged versions were left out. v0001 has no directory"
    )
    assert votes(tmp_path / "less") == votes(data_dir)


def test_an_unwritable_destination_is_not_reported_as_damage(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, destination: Path, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(destination))

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(DataDirectoryError, match=r"could not be made: .*No space left on device"):
        back_up(data_dir, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_backup_leaves_nothing(data_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    copy = tmp_path / "backups" / "copy"
    # It waits right before it renames a version to its final name.
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "backup", str(copy), "--data-dir", str(data_dir)],
        env={**os.environ, "PREFLOOP_FAILPOINT": "rename:2:block"},
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("backups/.copy.*.partial/policies/.v0001.*.partial/manifest.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, b"Traceback" in said) == (130 if number == signal.SIGINT else 128 + number, False)
        assert list(tmp_path.glob("backups/*")) == []
        assert list(tmp_path.glob("backups/.*")) == []
    finally:
        process.kill()
        process.communicate()
