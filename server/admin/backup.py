"""Copies a data directory while server and learner run. The copy is a data directory itself.

The order makes it complete. A version is published before it is registered, and marked as pruned before it is removed.
So versions are copied first and the database last, repeatedly, until every unpruned version in the copied database was
copied. A version that was pruned in the meantime may be in the copy, too; the next round there removes it.

Versions are copied, not linked: a backup that shares its blocks with the original is damaged with it. Directories that
can be created again (`merged/`, `cache/`) and the files of rounds (`rounds/`) are left out. A running round would
resume from `rounds/`, so in the copy it is marked as failed, and the next one begins.
"""

import shutil
from contextlib import closing
from pathlib import Path

from server.shared.errors import DatabaseError, DataDirectoryError, ManifestError
from server.store.files.manifest import new_directory, verify
from server.store.files.sharing import fetch_all
from server.store.store import Store

UNDER_WAY = "It was in progress when this backup was made."


def back_up(data_dir: Path, destination: Path) -> list[str]:
    """Create `destination`, whole or not at all. Returns a sentence for each damaged version, which is left out.

    Raises DataDirectoryError if there is nothing to copy, or the copy fails."""
    if not Store.exists(data_dir):
        raise DataDirectoryError(f"There is no data in {str(data_dir)!r} to back up.")
    if destination.exists():
        raise DataDirectoryError(f"{str(destination)!r} exists already; a backup never overwrites anything.")
    with closing(Store.open(data_dir)) as store:
        try:
            fetch_all(store, data_dir)
            with new_directory(destination) as staging:
                damaged = _copy(store, data_dir, staging)
        except (OSError, DatabaseError) as error:
            raise DataDirectoryError(f"The backup {str(destination)!r} could not be made: {error}.") from error
    return damaged


def _copy(store: Store, data_dir: Path, staging: Path) -> list[str]:
    tried: dict[str, str] = {}
    while True:
        for version in sorted(_versions(store) - tried.keys()):
            tried[version] = _copy_version(data_dir / version, staging / version)
        store.copy_to(staging)
        with closing(Store.open_file(staging)) as copy:
            needed = _versions(copy)
            if round_ := copy.rounds.running():
                copy.rounds.finish(round_.id, "failed", reason=UNDER_WAY)
            copy.round_requests.withdraw(UNDER_WAY)
            copy.shared_versions.forget_identity()
        if needed <= tried.keys():
            return [tried[version] for version in sorted(needed) if tried[version]]


def _versions(store: Store) -> set[str]:
    """The directories, relative to the data directory, of everything published and not pruned."""
    policies = {f"policies/{policy.version}" for policy in store.policies.page() if policy.prune_time is None}
    return policies | {f"reward_models/{model.version}" for model in store.reward_models.all()}


def _copy_version(source: Path, final: Path) -> str:
    """Copy one version. Returns a sentence if it is damaged, else an empty string."""
    try:
        with new_directory(final) as staging:
            shutil.copytree(source, staging, dirs_exist_ok=True)
        verify(final)
    except (OSError, ManifestError):
        shutil.rmtree(final, ignore_errors=True)
        # Is the version damaged or now pruned, or did its destination fail, for example with a full disk?
        try:
            verify(source)
        except ManifestError as error:
            return f"{error}"
        except OSError as error:
            return f"{final.name} could not be read ({error})."
        raise
    return ""
