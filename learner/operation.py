"""What an operator does by hand: promote a version, or go back to one. Reads and writes the store; servers follow.

Each move is a compare-and-set from the version that was active when the command began, so that two operators, or an
operator and a round, never undo each other unseen.
"""

import getpass
from contextlib import closing

from learner.checkpoint import verified
from learner.publishing import wait_until_loaded
from learner.settings import LearnerSettings
from server.errors import FailedPreconditionError
from server.records import PointerAction
from server.store import FeedbackStore


def promote(settings: LearnerSettings, version: str, reason: str = "") -> str:
    """Makes `version` the active one; a sentence on how it went. Raises ServiceError with nothing changed."""
    with closing(FeedbackStore.open(settings.data_dir)) as store:
        return _move(store, settings, version, "promote", reason or "promoted by hand")


def rollback(settings: LearnerSettings, version: str | None = None, reason: str = "") -> str:
    """Makes the version that was active before, or an older one, the active one again."""
    with closing(FeedbackStore.open(settings.data_dir)) as store:
        active = store.registry.active_policy().version
        target = version or store.registry.previous_version()
        if target is None:
            raise FailedPreconditionError("NOTHING_TO_ROLL_BACK", f"No version was active before {active}.")
        return _move(store, settings, target, "rollback", reason or f"rolled back from {active}")


def _move(store: FeedbackStore, settings: LearnerSettings, version: str, action: PointerAction, reason: str) -> str:
    active = store.registry.active_policy().version
    if store.registry.policy(version).version == active:
        return f"{version} is active already; nothing was changed."
    # The store knows why a version may not be activated; what it lets pass must be whole.
    if store.registry.policy(version).prune_time is None:
        verified(settings.data_dir / "policies" / version)
    store.registry.activate_policy(
        version, actor=f"operator {getpass.getuser()}", action=action, reason=reason, expected_active_version=active
    )
    loaded = wait_until_loaded(store, version, settings.load_timeout_seconds)
    if store.registry.active_policy().version != version:
        raise FailedPreconditionError("POLICY_UNLOADABLE", f"{version} was activated and taken back: {loaded}")
    return f"{version} is active in place of {active}; {loaded}"
