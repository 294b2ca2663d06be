"""The last two stages: the chosen candidate becomes an immutable version, and the pointer moves to it."""

import time
from typing import Any, Literal

from learner.gate.rules import Verdict
from learner.improve.candidates import candidate, copy_candidate
from learner.round.review.canary import begin_canary
from learner.round.workspace import Workspace
from server.shared.errors import ConflictError
from server.store.files.manifest import copy_tokenizer, made_from, new_version, verify
from server.store.files.sharing import share
from server.store.store import Store


def publish(work: Workspace, verdict: Verdict) -> str:
    """Writes and registers the new version; returns its name."""
    if work.done("publish") and work.round.policy_version:
        return work.round.policy_version
    version = work.round.policy_version or work.free_version("policies", "v")
    work.update(policy_version=version)
    # What was fine-tuned becomes a reference, which must have all weights.
    own = work.round.kind == "sft"
    kind: Literal["adapter", "full"] = "adapter" if work.settings.policy.train == "lora" and not own else "full"
    reference = version if own else work.round.reference_version
    directory = work.policy_directory(version)
    with work.stages.stage("publish", f"publishing {version}"):
        # It already exists if the round was killed after the rename; a version never changes.
        if not directory.exists():
            with new_version(directory, kind=kind, reference_version=reference, info=about(work, verdict)) as new:
                weights = candidate(work.directory, verdict.chosen.step)
                if own:
                    work.policy.load(weights)
                    work.policy.save_merged(new)
                else:
                    copy_candidate(weights, new)
                if kind == "full":
                    copy_tokenizer(work.reference_directory, new)
        verify(directory)
        share(work.store, work.settings.data_dir, "policies", version, fence=work.lease)
    work.store.policies.register(
        version,
        kind=kind,
        state="candidate" if verdict.promoted else "rejected",
        parent_version=work.round.incumbent_version,
        reference_version=reference,
        round_id=work.round.id,
        reward_model_version=work.round.reward_model_version,
        metrics=work.round.metrics.to_json()["gate"]["chosen"],
        reason=" ".join(verdict.reasons),
        fence=work.lease,
    )
    work.record("publish")
    return version


def about(work: Workspace, verdict: Verdict) -> dict[str, Any]:
    """What a version's manifest says beside its files: how it was made, and from which model."""
    origin = work.store.policies.get(work.round.reference_version).origin_version
    return {
        "round_id": work.round.id,
        "step": verdict.chosen.step,
        "settings": work.round.settings,
        "versions": work.round.metrics.versions,
        "model": made_from(work.policy_directory(origin)),
    }


def activate(work: Workspace, version: str, verdict: Verdict) -> tuple[Literal["promoted", "canary", "rejected"], str]:
    """Activates the version, or lets it wait as a canary, unless the gate rejected it or an operator changed the
    policy. Returns the round's state and a sentence about it."""
    if verdict.canary:
        return begin_canary(work, version)
    if not verdict.promoted:
        return "rejected", f"{version} was not promoted: {' '.join(verdict.reasons)}"
    incumbent = work.round.incumbent_version
    try:
        if work.store.policies.active().version != version:
            work.store.policies.activate(
                version,
                actor="learner",
                reason=f"round {work.round.id}",
                expected_active_version=incumbent,
                fence=work.lease,
            )
    except ConflictError as error:
        return "rejected", f"{version} was not activated because the policy was changed in the meantime: {error}"
    with work.stages.stage("activate", f"waiting for servers to load {version}"):
        loaded = wait_until_loaded(work.store, version, work.settings.load_timeout_seconds)
    # A server that could not load the version has moved the pointer back.
    if work.store.policies.active().version != version:
        return "rejected", f"{version} was activated and then reverted: {loaded}"
    return "promoted", f"{version} is active instead of {incumbent}; {loaded}"


def wait_until_loaded(store: Store, version: str, timeout: float) -> str:
    """Waits until live servers have loaded `version`; returns a clause about it, at once if no server is live."""
    deadline = time.monotonic() + timeout
    while True:
        replicas = store.replicas.alive()
        if not replicas:
            return "no server is running, so the next one to start will load it."
        if all(r.loaded_version == version for r in replicas):
            return f"{len(replicas)} running server{'s' * (len(replicas) > 1)} loaded it."
        if failed := [r for r in replicas if r.error.startswith(f"{version}:")]:
            return f"a server could not load it and kept {failed[0].loaded_version}: {failed[0].error}"
        if time.monotonic() > deadline:
            waiting = sum(r.loaded_version != version for r in replicas)
            return f"{waiting} of {len(replicas)} running servers had not loaded it after {timeout:.0f} s."
        time.sleep(0.2)
