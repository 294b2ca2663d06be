"""Manual decisions: promote a version, roll back to one, leave a user's votes out. Reads and writes the store; servers
follow, if the version is of the model that they have loaded.

Each move of the pointer is a compare-and-set from the version that was active when the command began, so that two
operators, or an operator and a round, never undo each other's move without noticing.
"""

import getpass
import shlex
from contextlib import closing

from learner.round.publish import wait_until_loaded
from learner.settings import LearnerSettings
from server.shared.errors import FailedPreconditionError
from server.store.files.manifest import made_from, verify
from server.store.learning.records import PointerAction
from server.store.store import Store


def promote(settings: LearnerSettings, version: str, reason: str = "") -> str:
    """Makes `version` the active one; returns a sentence about it. If it raises ServiceError, nothing was changed."""
    with closing(Store.open(settings.data_dir)) as store:
        active = store.policies.active().version
        return _move(store, settings, active, version, "promote", reason or "promoted by hand")


def rollback(settings: LearnerSettings, version: str | None = None, reason: str = "") -> str:
    """Makes the version that was active before, or an older one, the active one again."""
    with closing(Store.open(settings.data_dir)) as store:
        active, target = store.policies.rollback_step(version)
        return _move(store, settings, active, target, "rollback", reason or f"rolled back from {active}")


def quarantine(settings: LearnerSettings, user: str, reason: str = "", *, lift: bool = False) -> str:
    """Leaves a user's votes out of the rounds that begin from now on, or lets them count again. Raises NotFoundError
    for a user who never voted."""
    with closing(Store.open(settings.data_dir)) as store:
        votes = store.snapshots.votes_of([user], store.snapshots.watermark())
        if lift:
            changed = store.quarantine.lift(user, actor=operator(), reason=reason)
            return f"{user}'s {votes} votes count again." if changed else f"{user} is not in quarantine."
        changed = store.quarantine.set(user, actor=operator(), reason=reason)
        running = store.rounds.running()
    if not changed:
        return f"{user} is in quarantine already; nothing was changed."
    sentence = f"{user} is in quarantine: rounds that begin from now on leave {votes} votes out."
    return sentence + (f" {running.id} began earlier and still uses them." if running else "")


def operator() -> str:
    """Who moves the pointer by a command."""
    return f"operator {getpass.getuser()}"


def needs_restart(store: Store, settings: LearnerSettings, origin: str) -> str:
    """What must be done to serve a version of another model than before, in a sentence."""
    model = shlex.quote(made_from(settings.data_dir / "policies" / origin))
    origins, replicas = store.policies.origins(), store.replicas.alive()
    if not replicas:
        return f"No server is running: start it with --model {model}."
    others = [replica.id for replica in replicas if origins.get(replica.loaded_version) != origin]
    if not others:
        return f"Every running server was started with its model, {model}."
    return f"Restart {', '.join(others)} with --model {model}; until then, what is loaded there is served."


def _move(
    store: Store, settings: LearnerSettings, active: str, version: str, action: PointerAction, reason: str
) -> str:
    policy, loadable = store.policies.get(version), store.policies.active().origin_version
    if version == active:
        return f"{version} is active already; nothing was changed."
    # The store checks whether a version may be activated; the files of one that may must be complete.
    if policy.prune_time is None:
        verify(settings.data_dir / "policies" / version)
    store.policies.activate(version, actor=operator(), action=action, reason=reason, expected_active_version=active)
    if policy.origin_version != loadable:
        return f"{version} is active instead of {active}. {needs_restart(store, settings, policy.origin_version)}"
    loaded = wait_until_loaded(store, version, settings.load_timeout_seconds)
    if store.policies.active().version != version:
        raise FailedPreconditionError("POLICY_UNLOADABLE", f"{version} was activated and then reverted: {loaded}")
    return f"{version} is active instead of {active}; {loaded}"
