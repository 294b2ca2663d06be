"""One run of the learner: a round, begun or resumed, that learns from votes or from demonstrations.

Each stage of a round ends with one fenced write that records it. `run_once` resumes after the last recorded stage, so a
round may be killed anywhere. A stage's output is on disk before the stage is recorded: the reward model under
`reward_models/`, candidates and TensorBoard files under `rounds/<id>/`, the version under `policies/`. A round that
raises is recorded as failed, and the served policy is unchanged.
"""

import math

from learner.model.device import require_memory, resolve_device
from learner.process import return_large_blocks
from learner.progress import Stages
from learner.round.alignment.stages import run as align
from learner.round.begin import begin
from learner.round.lease import learner_lease
from learner.round.report import Report
from learner.round.resume import began_with, change_dtype, resumable
from learner.round.retention import prune
from learner.round.sft.stages import run as fine_tune
from learner.round.workspace import Workspace
from learner.settings import LearnerSettings
from learner.workers.launch import check_workers
from server.shared.model.dtype import resolve_dtype
from server.store.chats.records import Snapshot
from server.store.files.sharing import fetch_all, share_all
from server.store.learning.records import Lease, Round, RoundKind
from server.store.store import Store

COMMANDS: dict[RoundKind, str] = {"alignment": "learner run-once", "sft": "learner sft"}
# Settings that a resumed round takes from the machine that resumes it.
THIS_MACHINES = ("data_dir", "dtype", "learner_device", "learner_gpu_memory_share", "workers")


def run_once(settings: LearnerSettings, stages: Stages, *, wait: bool = False, kind: RoundKind = "alignment") -> Report:
    """Runs or resumes one round; with `wait`, waits while another learner is running."""
    if not Store.exists(settings.data_dir):
        return Report("nothing", f"There is no data in {str(settings.data_dir)!r} yet: start `server serve` and vote.")
    store = Store.open(settings.data_dir)
    try:
        with learner_lease(store, settings.data_dir, settings.lease_seconds, wait=wait) as lease:
            if lease is None:
                return Report("nothing", "Another learner is running on this data directory; nothing was done.")
            share_all(store, settings.data_dir)
            fetch_all(store, settings.data_dir)
            report = _run_or_resume(store, lease, settings, stages, kind)
            prune(store, settings.data_dir, settings.keep_versions, fence=lease)
            return report
    finally:
        store.close()


def _run_or_resume(store: Store, lease: Lease, settings: LearnerSettings, stages: Stages, kind: RoundKind) -> Report:
    stopped = store.rounds.running()
    if stopped and stopped.kind != kind:
        command = COMMANDS[stopped.kind]
        return Report("nothing", f"{stopped.id} was stopped: `{command}` finishes it first. Nothing was changed.")
    dtype, device = resolve_dtype(settings.dtype), resolve_device(settings.learner_device)
    require_memory(settings.server_gpu_memory_share, settings.learner_gpu_memory_share)
    if kind == "alignment":
        check_workers(settings.workers, settings.learner_device)
    settings = settings.model_copy(update={"dtype": dtype.name})
    current = resumable(store, lease, settings.max_resumes, stages)
    if current:
        stages.console.print(f"resuming {current.id} after its stage {current.stage}", highlight=False)
        # The settings that the round began with, except for the data directory and this machine's dtype and devices.
        here = {name: getattr(settings, name) for name in THIS_MACHINES}
        began_in = current.settings["dtype"]
        settings = began_with(current, here)
        if began_in != dtype.name:
            current = change_dtype(store, lease, current, settings, stages)
    # Users in quarantine when the round began are left out to its end, even if that changes in the meantime.
    quarantined = current.quarantined if current else sorted(store.quarantine.current())
    snapshot = take_snapshot(store, settings, current, quarantined)
    if current is None:
        stages.console.print(f"computing in {dtype} on {device}", highlight=False)
        begun = begin(store, lease, settings, stages, snapshot, quarantined, kind)
        if isinstance(begun, str):
            return Report("nothing", begun)
        current, settings = begun
    if settings.policy.checkpoint_activations == "on" and device.type == "cpu":
        return_large_blocks()
    work = Workspace(store, lease, settings, stages, current, snapshot)
    work.directory.mkdir(parents=True, exist_ok=True)
    try:
        return fine_tune(work) if kind == "sft" else align(work)
    except KeyboardInterrupt:
        # Asked to stop: the next run resumes from what is on disk.
        store.rounds.stop(current.id, fence=lease)
        raise
    except Exception as error:
        # Boundary of the job: the failure is recorded, the served policy is unchanged, and the caller gets the error.
        store.rounds.finish(current.id, "failed", reason=f"{type(error).__name__}: {error}", fence=lease)
        work.clean()
        raise
    finally:
        work.close()


def take_snapshot(store: Store, settings: LearnerSettings, current: Round | None, quarantined: list[str]) -> Snapshot:
    """The feedback that a new round learns from, or that the current one does, as far as it was not deleted since."""
    if current:
        snapshot = store.snapshots.take(
            current.watermark, settings.max_votes, quarantined, current.judge, current.machine_watermark
        )
    else:
        snapshot = store.snapshots.take(None, settings.max_votes, quarantined, settings.judge.name)
    if settings.skip_rolled_back:
        before = current.create_time if current else math.inf
        snapshot = snapshot.without(store.lineage.rolled_back(before))
    return snapshot
