"""Begins a round, if there is something to learn from and memory to learn in.

Whether activations are kept or computed again is decided here, once: the round stores it, since a resumed round must
compute the same numbers.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from learner.model.device import read_memory, resolve_device
from learner.progress import Stages
from learner.round.preconditions import blocked, too_little_new
from learner.round.sft.examples_stage import continuing, nothing_to_imitate, read_examples
from learner.round.token_ids import TokenIds
from learner.settings import LearnerSettings
from learner.worker_settings import WorkerSettings
from server.shared.errors import FailedPreconditionError
from server.shared.machine import GIB, read_machine
from server.shared.model.context import context_length
from server.shared.model.dtype import DtypeName
from server.shared.model.families import family_of, limit_of
from server.shared.model.needs import RoundNeed, Training, round_need
from server.shared.model.shape import read_shape
from server.shared.model.text import ChatText
from server.store.chats.records import Prompt, Snapshot
from server.store.learning.records import Lease, Round, RoundKind
from server.store.store import Store


@dataclass(frozen=True)
class MemoryPlan:
    """What a round needs, with `checkpoint` or without, and the bytes that the machine has and has free."""

    need: RoundNeed
    checkpoint: bool
    total: int
    free: int

    def __str__(self) -> str:
        how = "computed again in the backward pass" if self.checkpoint else "kept for the backward pass"
        return f"needs about {_gib(self.need.total)} of memory, {_gib(self.free)} are free; activations are {how}"


def begin(
    store: Store,
    lease: Lease,
    settings: LearnerSettings,
    stages: Stages,
    snapshot: Snapshot,
    quarantined: list[str],
    kind: RoundKind = "alignment",
) -> tuple[Round, LearnerSettings] | str:
    """The new round with its final settings, or a sentence that says why there is none. Raises FailedPreconditionError
    if this model cannot learn."""
    if reason := blocked(store, settings):
        return reason
    nothing = nothing_to_imitate if kind == "sft" else too_little_new
    if reason := nothing(store, snapshot, quarantined, settings):
        return reason
    active = store.policies.active()
    reference = active.reference_version
    directory = settings.data_dir / "policies" / reference
    if kind == "sft":
        # It goes on from what people have, which what they voted for has made.
        policy = continuing(settings.policy, active, settings.data_dir)
        # Its process trains by itself.
        settings = settings.model_copy(update={"policy": policy, "workers": WorkerSettings()})
    check_family(directory, settings)
    asked = store.snapshots.prompts(limit=settings.max_prompts, without=quarantined)
    ids = TokenIds(store, reference, settings)
    prompts = ids.prompts(asked)
    if kind == "sft":
        prompts += example_prompts(ids.snapshot(snapshot), directory, settings)
    plan = plan_memory(settings, directory, prompts, resolve_device(settings.learner_device))
    if reason := too_little_memory(plan, settings):
        return reason
    stages.console.print(str(plan), highlight=False)
    policy = settings.policy.model_copy(update={"checkpoint_activations": "on" if plan.checkpoint else "off"})
    settings = settings.model_copy(update={"policy": policy})
    stored = settings.model_dump(mode="json", exclude={"data_dir", "store_url", "policy_url"})
    begun = store.rounds.create(
        snapshot.watermark,
        stored,
        reference_version=reference,
        quarantined=quarantined,
        judge=snapshot.judge,
        machine_watermark=snapshot.machine_watermark,
        kind=kind,
        fence=lease,
    )
    return begun, settings


def example_prompts(snapshot: Snapshot, reference: Path, settings: LearnerSettings) -> list[Prompt]:
    """The examples of a round that imitates, as long prompts: it reads their answers, and samples none."""
    longest = context_length(reference, settings.max_model_len, settings.trust_remote_code)
    examples = read_examples(snapshot, ChatText.load(reference, settings.trust_remote_code), longest, settings)
    return [Prompt("", [*prompt, *answer[1:]], 1) for prompt, answer in (one.tokens for one in examples)]


def check_family(reference: Path, settings: LearnerSettings) -> None:
    """Raises FailedPreconditionError if the reference is of a family that cannot learn as it is set."""
    assert settings.dtype != "auto", "a round's dtype is resolved before it begins"
    full = settings.policy.train == "full"
    if limit := limit_of(reference, settings.dtype, "full training" if full else "learning"):
        work = "be trained in full" if full else "learn"
        advice = "Set policy.train to lora." if limit.work == "full training" else "Nothing was changed."
        raise FailedPreconditionError(
            "MODEL_FAMILY", f"A model of the family {family_of(reference)} cannot {work}: {limit.reason}. {advice}"
        )


def plan_memory(settings: LearnerSettings, reference: Path, prompts: list[Prompt], device: torch.device) -> MemoryPlan:
    """The plan for a round whose trainer is on `device`, and for workers as if all had this machine's memory or GPU.
    `reference` is a Hugging Face directory. Raises ManifestError if it cannot be read."""
    dtype = settings.dtype
    assert dtype != "auto", "a round's dtype is resolved before it begins"
    machine = read_machine()
    total, free = machine.memory, machine.available
    longest = context_length(reference, settings.max_model_len, settings.trust_remote_code)
    training = _training(settings, dtype, prompts, longest)
    shape, workers = read_shape(reference), settings.workers
    if device.type == "cuda":
        free, total = read_memory()

    def needed(training: Training) -> RoundNeed:
        need = round_need(shape, dtype, settings.kv_cache_gib, training)
        if device.type == "cuda":
            need = replace(need, engine=int(settings.learner_gpu_memory_share * total))
        if workers.count:
            need = need.of_workers(workers.count, together=device.type == "cpu" and not workers.ray)
        return need

    setting = settings.policy.checkpoint_activations
    checkpoint = setting == "on" or (setting == "auto" and needed(training).total > free)
    return MemoryPlan(needed(replace(training, checkpoint=checkpoint)), checkpoint, total, free)


def too_little_memory(plan: MemoryPlan, settings: LearnerSettings) -> str | None:
    """Why a round cannot fit into the machine's memory, in a sentence; None if it can."""
    if plan.need.total <= plan.total:
        return None
    need, policy = plan.need, settings.policy
    advice = [
        "set policy.checkpoint_activations to auto" if policy.checkpoint_activations == "off" else "",
        "train adapters instead of all weights" if policy.train == "full" else "",
        "lower policy.micro_batch_tokens" if need.activations + need.logits > need.total // 4 else "",
        "use a smaller model or a larger machine",
    ]
    return (
        f"A round needs about {_gib(need.total)} of memory ({_gib(need.engine)} for its engine, {_gib(need.trainer)} "
        f"for the weights and what steps them, {_gib(need.rollout + need.activations + need.logits)} for the longest "
        f"answers), more than the {_gib(plan.total)} here: {', or '.join(filter(None, advice))}. Nothing was changed."
    )


def _training(settings: LearnerSettings, dtype: DtypeName, prompts: list[Prompt], longest: int) -> Training:
    """What the round trains without checkpoints. Prompts that leave no room for an answer are left out of it."""
    policy = settings.policy.at(dtype)
    # DPO reads both answers of a vote at once.
    answers = 2 if settings.improver == "dpo" else 1
    fitting = [p for p in prompts if len(p.token_ids) + p.max_tokens <= longest]
    return Training(
        policy.train,
        policy.lora_rank,
        tokens=max([policy.micro_batch_tokens, *(answers * (len(p.token_ids) + p.max_tokens) for p in fitting)]),
        rollout_tokens=settings.training.episodes * max([0, *(p.max_tokens for p in fitting)]),
        checkpoint=False,
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
