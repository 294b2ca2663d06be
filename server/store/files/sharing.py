"""Versions between a data directory and shared storage, if the setting `policy_url` names one; nothing otherwise.

A version is in shared storage before the database says that it exists. Who comes first has made it: where two servers
prepare the first reference, one replaces its own. A data directory's copy was verified when it was made, and is
verified again when it is loaded.
"""

import fcntl
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.shared.errors import DataDirectoryError, ManifestError, UnavailableError
from server.store.files.manifest import same
from server.store.learning.records import Lease
from server.store.learning.shared_versions import Folder
from server.store.settings import StoreSettings
from server.store.store import Store

if TYPE_CHECKING:
    from server.store.files.storage import Storage

log = logging.getLogger(__name__)

# An upload that no row names and that is older was left by a process that was killed.
LEFT_SECONDS = 24 * 3600.0
# Folders of a version's weights and of what a server derived from them, now and in the first releases.
DERIVED = ("policies", "merged/bfloat16", "merged/float32", "merged")


def is_shared() -> bool:
    """Whether the settings name a storage."""
    return bool(StoreSettings.load().policy_url)


def shared_storage(store: Store) -> "Storage | None":
    """The storage that the settings name. Raises DataDirectoryError if it cannot be used here."""
    url = StoreSettings.load().policy_url
    if not url:
        return None
    try:
        from server.store.files.storage import Storage
    except ImportError as error:
        raise DataDirectoryError("policy_url needs the extra `storage`: pip install 'prefloop[storage]'.") from error
    return Storage(url, store.shared_versions.identity())


def share(store: Store, data_dir: Path, folder: Folder, version: str, *, fence: Lease | None = None) -> None:
    """Put a published version into shared storage; if it is there already, the data directory gets that one. Raises
    UnavailableError, and ConflictError if the lease went to another."""
    storage = shared_storage(store)
    if storage is None:
        return
    directory = data_dir / folder / version
    known = store.shared_versions.find(folder, version)
    if known is None:
        log.info("sharing %s", version)
        mine = storage.put(directory)
        known = store.shared_versions.claim(folder, version, mine, fence=fence)
        if known != mine:
            storage.remove(mine.object)
    if not same(directory, known.manifest_sha256):
        shutil.rmtree(directory)
        storage.fetch(known, directory)


def share_all(store: Store, data_dir: Path) -> None:
    """Put what is only in this data directory into shared storage, unless it is damaged, and get what others have made
    before. Raises UnavailableError."""
    if not is_shared():
        return
    for folder, version in _published(store):
        try:
            if (data_dir / folder / version).exists():
                share(store, data_dir, folder, version)
        except ManifestError as error:
            log.warning("%s is not shared: %s", version, error)


def fetch(store: Store, data_dir: Path, version: str, *, again: bool = False) -> None:
    """Bring a policy, and what it needs, into the data directory; with `again`, the policy even if it is there. Raises
    UnavailableError, and NotFoundError."""
    policy = store.policies.get(version)
    if again and store.shared_versions.find("policies", version):
        shutil.rmtree(data_dir / "policies" / version, ignore_errors=True)
    for name in dict.fromkeys((policy.origin_version, policy.reference_version, version)):
        _fetch(store, data_dir, "policies", name)


def locally(data_dir: Path, work: Callable[[Store, Path], None]) -> None:
    """Do one of these with a connection of its own, on any thread; nothing without shared storage."""
    if is_shared():
        with closing(Store.open(data_dir)) as store:
            work(store, data_dir)


def fetch_all(store: Store, data_dir: Path) -> None:
    """Bring everything that was not pruned into the data directory. Raises UnavailableError."""
    if not is_shared():
        return
    for folder, version in _published(store):
        _fetch(store, data_dir, folder, version)


def remove_pruned(store: Store, data_dir: Path) -> None:
    """Delete the weights of versions that are marked as pruned, here."""
    for policy in store.policies.page():
        if policy.prune_time is not None:
            for folder in DERIVED:
                shutil.rmtree(data_dir / folder / policy.version, ignore_errors=True)


def sweep_storage(store: Store) -> None:
    """Delete from shared storage what was pruned, and what uploads that were killed have left. For the learner's
    process, under its lease. Raises UnavailableError."""
    storage = shared_storage(store)
    if storage is None:
        return
    for policy in store.policies.page():
        if policy.prune_time is not None and (known := store.shared_versions.find("policies", policy.version)):
            storage.remove(known.object)
            store.shared_versions.remove("policies", policy.version)
    for name in storage.names(older_than=LEFT_SECONDS) - store.shared_versions.objects():
        storage.remove(name)


def _published(store: Store) -> Iterable[tuple[Folder, str]]:
    for policy in store.policies.page():
        if policy.prune_time is None:
            yield "policies", policy.version
    for model in store.reward_models.all():
        yield "reward_models", model.version


def _fetch(store: Store, data_dir: Path, folder: Folder, version: str) -> None:
    directory = data_dir / folder / version
    if directory.exists():
        return
    storage = shared_storage(store)
    if storage is None:
        return
    with _alone(data_dir / folder):
        if directory.exists():
            return
        known = store.shared_versions.find(folder, version)
        if known is None:
            raise UnavailableError(f"{version} is not in the shared storage yet.")
        log.info("fetching %s", version)
        storage.fetch(known, directory)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Server and learner of a machine may want the same version at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".fetching").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
