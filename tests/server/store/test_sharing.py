"""Versions in shared storage, a folder and a real S3: whole or not at all, and who came first has made them."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import from_url

from server.admin.backup import back_up
from server.shared.errors import ConflictError, UnavailableError
from server.shared.failpoints import VARIABLE
from server.store.files import sharing
from server.store.files.manifest import verify
from server.store.files.sharing import fetch, fetch_all, remove_pruned, share, share_all, shared_storage, sweep_storage
from server.store.files.storage import Storage
from server.store.store import Store
from tests.s3 import s3_server
from tests.server.conftest import publish_version, register
from tests.server.store.conftest import on_sqlite

pytestmark = on_sqlite
PROCESSES = multiprocessing.get_context("spawn")
SECONDS = 60


@pytest.fixture(scope="session")
def s3() -> Iterator[tuple[Path, dict[str, str]]]:
    with s3_server() as found:
        yield found


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of an empty shared storage are, which the settings name."""
    if request.param == "folder":
        monkeypatch.setenv("PREFLOOP_POLICY_URL", f"file://{tmp_path}/shared")
        return tmp_path / "shared"
    bucket, variables = request.getfixturevalue("s3")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREFLOOP_POLICY_URL", f"s3://bucket/{tmp_path.name}")
    return Path(bucket) / tmp_path.name


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The data directory of another machine, which has the same store, and the reference."""
    (tmp_path / "elsewhere").mkdir()
    publish_version(tmp_path / "elsewhere", "v0000")
    return tmp_path / "elsewhere"


def storage(store: Store) -> Storage:
    found = shared_storage(store)
    assert found
    return found


def published(store: Store, data_dir: Path, version: str) -> Path:
    directory = publish_version(data_dir, version)
    share(store, data_dir, "policies", version)
    register(store, version)
    return directory


def test_a_version_is_fetched_whole_with_what_it_needs(store: Store, tmp_path: Path, objects: Path) -> None:
    elsewhere = tmp_path / "empty"
    publish_version(tmp_path, "v0000")
    published(store, tmp_path, "v0001")
    share_all(store, tmp_path)
    fetch(store, elsewhere, "v0001")
    for version in ("v0000", "v0001"):
        assert verify(elsewhere / "policies" / version) == verify(tmp_path / "policies" / version)
    assert len(list(objects.rglob("manifest.json"))) == 2
    # Once more changes nothing.
    share_all(store, tmp_path)
    fetch_all(store, elsewhere)
    assert len(list(objects.rglob("manifest.json"))) == 2


def put_and_die(data_dir: Path, failpoint: str) -> None:
    os.environ[VARIABLE] = failpoint
    with closing(Store.open(data_dir)) as store:
        share(store, data_dir, "policies", "v0001")


@pytest.mark.parametrize("put", [1, 2])
def test_an_upload_that_was_killed_is_none_and_is_swept(
    store: Store, tmp_path: Path, elsewhere: Path, objects: Path, put: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_version(tmp_path, "v0001")
    process = PROCESSES.Process(target=put_and_die, args=(tmp_path, f"put:{put}"))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL
    left = storage(store).names()
    assert len(left) == put - 1
    assert store.shared_versions.objects() == set()
    share(store, tmp_path, "policies", "v0001")
    register(store, "v0001")
    sweep_storage(store)
    # Another process may be uploading now: what is left is deleted a day later.
    assert storage(store).names() == left | store.shared_versions.objects()
    monkeypatch.setattr(sharing, "LEFT_SECONDS", 0.0)
    sweep_storage(store)
    assert storage(store).names() == store.shared_versions.objects()
    fetch(store, elsewhere, "v0001")
    verify(elsewhere / "policies" / "v0001")


@pytest.mark.parametrize("lie", ["truncated", "swapped", "another manifest", "gone"])
def test_a_storage_that_lies_is_found_out(
    store: Store, tmp_path: Path, elsewhere: Path, objects: Path, lie: str
) -> None:
    published(store, tmp_path, "v0001")
    publish_version(tmp_path, "v0002", {"a": np.ones((5, 5), np.float32)})
    share(store, tmp_path, "policies", "v0002")
    bucket = from_url(os.environ["PREFLOOP_POLICY_URL"])
    one, other = (
        known.object for version in ("v0001", "v0002") if (known := store.shared_versions.find("policies", version))
    )

    def read(name: str) -> bytes:
        return bytes(obstore.get(bucket, name).bytes())

    weights, manifest = f"{one}/model.safetensors", f"{one}/manifest.json"
    whole = read(weights), read(manifest)
    match lie:
        case "truncated":
            obstore.put(bucket, weights, whole[0][:-1])
        case "swapped":
            obstore.put(bucket, weights, read(f"{other}/model.safetensors"))
        case "another manifest":
            obstore.put(bucket, manifest, read(f"{other}/manifest.json"))
            obstore.put(bucket, weights, read(f"{other}/model.safetensors"))
        case "gone":
            obstore.delete(bucket, weights)
    with pytest.raises(UnavailableError, match=r"is not what was published|cannot be used: .* not found"):
        fetch(store, elsewhere, "v0001")
    assert not (elsewhere / "policies" / "v0001").exists()
    obstore.put(bucket, weights, whole[0])
    obstore.put(bucket, manifest, whole[1])
    fetch(store, elsewhere, "v0001")
    verify(elsewhere / "policies" / "v0001")


def test_of_two_that_make_one_version_at_once_the_first_has_made_it(
    store: Store, tmp_path: Path, elsewhere: Path, objects: Path
) -> None:
    publish_version(tmp_path, "v0001")
    publish_version(elsewhere, "v0001", {"a": np.ones((5, 5), np.float32)})

    def other(data_dir: Path) -> None:
        with closing(Store.open(tmp_path)) as mine:
            share(mine, data_dir, "policies", "v0001")

    with ThreadPoolExecutor(2) as both:
        list(both.map(other, (tmp_path, elsewhere)))
    assert verify(tmp_path / "policies" / "v0001") == verify(elsewhere / "policies" / "v0001")
    [name] = store.shared_versions.objects()
    assert storage(store).names() == {name}


def test_a_learner_whose_lease_went_to_another_shares_nothing(store: Store, tmp_path: Path, objects: Path) -> None:
    publish_version(tmp_path, "v0001")
    first = store.leases.acquire("learner", "first", seconds=-1.0)
    assert store.leases.acquire("learner", "second", seconds=60.0)
    with pytest.raises(ConflictError, match="went to second"):
        share(store, tmp_path, "policies", "v0001", fence=first)
    assert store.shared_versions.find("policies", "v0001") is None


def test_what_was_pruned_goes_from_the_storage_and_from_every_data_directory(
    store: Store, tmp_path: Path, elsewhere: Path, objects: Path
) -> None:
    published(store, tmp_path, "v0001")
    fetch(store, elsewhere, "v0001")
    assert store.policies.prune("v0001")
    sweep_storage(store)
    remove_pruned(store, elsewhere)
    assert storage(store).names() == set()
    assert not (elsewhere / "policies" / "v0001").exists()


def test_a_storage_that_does_not_answer_says_so(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_version(tmp_path, "v0001")
    monkeypatch.setenv("PREFLOOP_POLICY_URL", "ftp://nowhere/x")
    with pytest.raises(UnavailableError, match="The shared storage ftp://nowhere/x cannot be used"):
        share(store, tmp_path, "policies", "v0001")


def test_a_damaged_version_is_not_shared_and_keeps_none_from_it(
    store: Store, tmp_path: Path, objects: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for version in ("v0001", "v0002"):
        publish_version(tmp_path, version)
        register(store, version)
    (tmp_path / "policies" / "v0002" / "model.safetensors").write_bytes(b"damaged")
    share_all(store, tmp_path)
    assert store.shared_versions.versions("policies") == {"v0001"}
    assert "v0002 is not shared" in caplog.text


def test_what_is_not_this_stores_is_never_removed(
    store: Store, tmp_path: Path, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(store, tmp_path, "v0001")
    bucket = from_url(os.environ["PREFLOOP_POLICY_URL"])
    obstore.put(bucket, "family/photos/2024/a.jpg", b"a")
    with closing(Store.open_file(tmp_path / "other")) as other:
        publish_version(tmp_path / "other", "v0001")
        share(other, tmp_path / "other", "policies", "v0001")
        monkeypatch.setattr(sharing, "LEFT_SECONDS", 0.0)
        sweep_storage(store)
        sweep_storage(other)
        assert (len(storage(store).names()), len(storage(other).names())) == (1, 1)
    assert bytes(obstore.get(bucket, "family/photos/2024/a.jpg").bytes()) == b"a"


def test_a_copy_of_a_store_reads_what_the_original_shared_and_removes_none_of_it(
    store: Store, tmp_path: Path, elsewhere: Path, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_version(tmp_path, "v0000")
    published(store, tmp_path, "v0001")
    share_all(store, tmp_path)
    back_up(tmp_path, tmp_path / "backup")
    monkeypatch.setattr(sharing, "LEFT_SECONDS", 0.0)
    with closing(Store.open_file(tmp_path / "backup")) as copy:
        fetch(copy, elsewhere, "v0001")
        assert copy.policies.prune("v0001")
        sweep_storage(copy)
    assert len(storage(store).names()) == 2


def test_a_version_that_is_nowhere_yet_is_awaited(store: Store, tmp_path: Path, objects: Path) -> None:
    with pytest.raises(UnavailableError, match="v0000 is not in the shared storage yet"):
        fetch(store, tmp_path / "empty", "v0000")
