"""Deletes the weights of old versions; their records stay.

Kept are versions that are active or loaded anywhere, the version before the active one, of each model what was made
from it and the version that was served last, the newest `keep_versions` others, and the references of all of these. A
version is first marked, then deleted. Once marked it cannot be activated, and if a learner is killed in between, the
next one deletes the directory.
"""

from pathlib import Path

from server.shared.failpoints import failpoint
from server.store.files.sharing import remove_pruned, sweep_storage
from server.store.learning.records import Lease
from server.store.store import Store


def prune(store: Store, data_dir: Path, keep_versions: int, *, fence: Lease) -> list[str]:
    """Deletes weights that need not be kept; returns the versions that were pruned now."""
    needed = {store.policies.previous_version()}
    for origin in set(store.policies.origins().values()):
        needed |= {origin, store.policies.last_served(origin)}
    whole = [policy for policy in store.policies.page() if policy.prune_time is None]
    spare = [policy.version for policy in whole if policy.state != "active" and policy.version not in needed]
    pruned = [version for version in spare[keep_versions:] if store.policies.prune(version, fence=fence)]
    failpoint("prune")
    remove_pruned(store, data_dir)
    sweep_storage(store)
    return pruned
