"""Old versions go: their weights, never their record.

Kept are the reference, what is active or loaded anywhere, the version before it, and the newest `keep_versions` others.
A version is marked first and removed second: from the mark on it cannot be activated, and a learner that is killed
between the two leaves a directory that the next one removes.
"""

import shutil
from pathlib import Path

from server.shared.failpoints import failpoint
from server.store.learning.records import Lease
from server.store.store import Store

# A version's own directory, and what a server derived from it, now and in the first releases.
FOLDERS = ("policies", "merged/bfloat16", "merged/float32", "merged")


def prune(store: Store, data_dir: Path, keep_versions: int, *, fence: Lease) -> list[str]:
    """Removes what need not be kept; the versions whose weights went."""
    previous = store.policies.previous_version()
    whole = [policy for policy in store.policies.page() if policy.prune_time is None]
    spare = [p.version for p in whole if p.state != "active" and p.version not in (previous, p.reference_version)]
    pruned = [version for version in spare[keep_versions:] if store.policies.prune(version, fence=fence)]
    failpoint("prune")
    for policy in store.policies.page():
        if policy.prune_time is not None:
            for folder in FOLDERS:
                shutil.rmtree(data_dir / folder / policy.version, ignore_errors=True)
    return pruned
