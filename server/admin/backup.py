"""A copy of a data directory, made while server and learner run. It is a data directory itself.

The order makes it whole. A version is published before it is registered, and marked as pruned before it is removed. So
versions are copied first and the database last, and again, until every version that the copied database calls whole was
copied. A version that was pruned meanwhile may be in the copy, too; the next round there removes it.

Versions are copied, not linked: a backup that shares its blocks with the original is damaged with it. What can be made
again (`merged/`, `cache/`) and what rounds wrote for people to read (`rounds/`) is left out. With `rounds/` goes
what a round under way would go on from, so in the copy it has failed, and the next one begins.
"""

import shutil
from contextlib import closing
from pathlib import Path

from server.shared.errors import DatabaseError, DataDirectoryError, ManifestError
from server.store.files.manifest import new_directory, verify
from server.store.store import Store

UNDER_WAY = "It was under way when this backup was made."


def back_up(data_dir: Path, destination: Path) -> list[str]:
    """Makes `destination`, whole or not at all; a sentence on each version that is damaged and was left out.

    Raises DataDirectoryError where there is nothing to copy, or the copy cannot be made."""
    if not Store.exists(data_dir):
        raise DataDirectoryError(f"There is no data in {str(data_dir)!r} to back up.")
    if destination.exists():
        raise DataDirectoryError(f"{str(destination)!r} exists already; a backup is never written over.")
    with closing(Store.open(data_dir)) as store:
        try:
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
        with closing(Store.open(staging)) as copy:
            needed = _versions(copy)
            if round_ := copy.rounds.running():
                copy.rounds.finish(round_.id, "failed", reason=UNDER_WAY)
            copy.round_requests.withdraw(UNDER_WAY)
        if needed <= tried.keys():
            return [tried[version] for version in sorted(needed) if tried[version]]


def _versions(store: Store) -> set[str]:
    """The directories, below the data directory, of all that was published and not pruned."""
    policies = {f"policies/{policy.version}" for policy in store.policies.page() if policy.prune_time is None}
    return policies | {f"reward_models/{model.version}" for model in store.reward_models.all()}


def _copy_version(source: Path, final: Path) -> str:
    """Copies one version; what is wrong with it, in a sentence, or nothing."""
    try:
        with new_directory(final) as staging:
            shutil.copytree(source, staging, dirs_exist_ok=True)
        verify(final)
    except (OSError, ManifestError):
        shutil.rmtree(final, ignore_errors=True)
        # Is it the version, damaged or pruned meanwhile, or the place where it goes, a full disk say?
        try:
            verify(source)
        except ManifestError as error:
            return f"{error}"
        except OSError as error:
            return f"{final.name} could not be read ({error})."
        raise
    return ""
