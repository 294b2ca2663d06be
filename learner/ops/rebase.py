"""`learner rebase`: another model becomes the reference, in the same data directory.

Conversations, votes, keys and rounds stay. The new reference is the next version, and begins a lineage of its own; the
lineages before it stay, to go back to. It is published by one rename, then registered and made active in one
transaction: a run that was killed is continued by the next one with the same model.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from learner.ops.manual_decisions import needs_restart, operator
from learner.round.lease import learner_lease
from learner.round.workspace import free_version
from learner.settings import LearnerSettings
from server.reference.reference import prepare_reference, same_model
from server.shared.errors import DataDirectoryError, FailedPreconditionError, ManifestError
from server.shared.model.dtype import resolve_dtype
from server.store.files.manifest import read_manifest, verify
from server.store.files.sharing import share
from server.store.learning.records import Lease
from server.store.store import Store


def rebase(settings: LearnerSettings, model: str, reason: str, say: Callable[[str], None]) -> str:
    """Makes `model` the one to serve and to train; returns a sentence about it. `say` gets a line before slow steps.

    A model that was the reference before is not prepared again: the version of it that was served last becomes active.
    If it raises ServiceError, the active version has not changed."""
    with (
        closing(Store.open(settings.data_dir)) as store,
        learner_lease(store, settings.data_dir, settings.lease_seconds) as lease,
    ):
        if lease is None:
            raise FailedPreconditionError(
                "ROUND_RUNNING", "A learner is running a round: wait for its end, or stop it. Nothing was changed."
            )
        return _rebase(store, lease, settings, model, reason, say)


def find_origin(data_dir: Path, model: str) -> str | None:
    """The newest version that was made from `model`, active or not, or published by a run that was killed. Of what was
    fine-tuned from it the manifest names the round instead."""
    for directory in sorted((data_dir / "policies").glob("v[0-9]*"), reverse=True):
        try:
            manifest = read_manifest(directory)
        except ManifestError:
            continue
        ours = manifest.reference_version == directory.name and "round_id" not in manifest.info
        if ours and same_model(str(manifest.info.get("model")), model):
            return directory.name
    return None


def _rebase(
    store: Store, lease: Lease, settings: LearnerSettings, model: str, reason: str, say: Callable[[str], None]
) -> str:
    active = store.policies.active()
    origin = find_origin(settings.data_dir, model) or free_version(store, settings.data_dir, "policies", "v")
    if origin == active.origin_version:
        return f"{active.version}, which is active, is of {model} already; nothing was changed."
    _prepare(settings, model, origin, say)
    version = store.policies.last_served(origin) or origin
    if version != origin:
        verify(settings.data_dir / "policies" / version)
    share(store, settings.data_dir, "policies", origin, fence=lease)
    with store.transaction():
        # Registering it again changes nothing.
        store.policies.register(
            origin,
            kind="full",
            state="candidate",
            parent_version=None,
            reference_version=origin,
            round_id=None,
            reward_model_version=None,
            metrics={},
            reason=f"The reference made from {model}.",
            fence=lease,
        )
        store.policies.activate(
            version,
            actor=operator(),
            action="promote",
            reason=reason or f"the model is {model}",
            expected_active_version=active.version,
            fence=lease,
        )
    stopped = store.rounds.running()
    given_up = f" {stopped.id}, which was stopped, will be given up." if stopped else ""
    return f"{version} is active instead of {active.version}. {needs_restart(store, settings, origin)}{given_up}"


def _prepare(settings: LearnerSettings, model: str, reference: str, say: Callable[[str], None]) -> None:
    dtype = resolve_dtype(settings.dtype).name
    try:
        prepare_reference(settings.data_dir, model, say, settings.trust_remote_code, dtype, reference)
    except OSError as error:
        raise DataDirectoryError(f"{str(settings.data_dir)!r} cannot be written ({error}).") from error
