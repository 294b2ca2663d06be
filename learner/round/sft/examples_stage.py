"""The demonstrations and corrections that a round learns from."""

import json
from pathlib import Path

from learner.improve.sft.examples import Example, Split, split, to_examples
from learner.improve_settings import PolicySettings
from learner.process import package_versions
from learner.reward.dataset import usable_corrections
from learner.round.workspace import Workspace
from learner.settings import LearnerSettings
from server.shared.model.prompt import with_system
from server.shared.model.text import ChatText
from server.store.chats.records import Correction, Demonstration, Snapshot
from server.store.files.manifest import read_manifest
from server.store.learning.records import PolicyVersion
from server.store.learning.round_metrics import PromptCounts, RoundMetrics
from server.store.store import Store


def usable(snapshot: Snapshot, settings: LearnerSettings) -> list[Demonstration | Correction]:
    """The demonstrations, and the corrections that may train."""
    return [*snapshot.demonstrations, *usable_corrections(snapshot, settings.gate.judge_share)]


def nothing_to_imitate(
    store: Store, snapshot: Snapshot, quarantined: list[str], settings: LearnerSettings
) -> str | None:
    """Why no round can learn from demonstrations now, in a sentence; None if one can. What did not serve, or serves no
    more, may be tried again; so may other users' examples."""
    examples = usable(snapshot, settings)
    if not examples:
        return "There are no demonstrations or corrections yet; nothing was changed."
    active, last = store.policies.active(), store.rounds.last_fine_tuned()
    if last and last.policy_version in store.lineage.ancestors(active.version) and last.quarantined == quarantined:
        new = sum(one.event_seq > last.watermark for one in examples)
        if not new:
            return f"There are no new demonstrations or corrections since {last.id}; nothing was changed."
    if active.version == active.reference_version:
        return None
    kind = read_manifest(settings.data_dir / "policies" / active.version).kind
    if (kind == "adapter") != (settings.policy.train == "lora"):
        return (
            f"The active {active.version} is of the kind {kind}, but policy.train is {settings.policy.train}: change "
            "policy.train. Nothing was changed."
        )
    return None


def continuing(policy: PolicySettings, active: PolicyVersion, data_dir: Path) -> PolicySettings:
    """The settings of a round that goes on from the active version: an adapter keeps its size and its scale."""
    policy = policy.model_copy(update={"start_from": "active"})
    file = data_dir / "policies" / active.version / "adapter_config.json"
    if not file.exists():
        return policy
    config = json.loads(file.read_text(encoding="utf-8"))
    return policy.model_copy(update={"lora_rank": config["r"], "lora_alpha": config["lora_alpha"]})


def read_examples(snapshot: Snapshot, text: ChatText, longest: int, settings: LearnerSettings) -> list[Example]:
    """The examples that this model can read, of at most `longest` tokens."""

    def encode(messages: list[dict[str, str]], began: float) -> list[int]:
        return text.prompt(with_system(messages, settings.system_prompt), began)

    corrections = usable_corrections(snapshot, settings.gate.judge_share)
    return to_examples(snapshot.demonstrations, corrections, encode, text.answer, text.text, longest)


def load_examples(work: Workspace) -> Split:
    """The examples to train on and those held out; records which they are."""
    settings = work.settings
    examples = read_examples(work.snapshot, work.text, work.longest, settings)
    known = work.store.lineage.imitated(work.round.incumbent_version)
    found = split(examples, known, settings.sft, settings.reward.user_share)
    if not work.done("improve"):
        prompts = PromptCounts(len(work.prompts.train), len(work.prompts.held_out), work.prompts.own)
        work.store.lineage.set_round_votes(work.round.id, found.sides, fence=work.lease)
        work.record("snapshot", RoundMetrics(prompts=prompts, versions=package_versions()))
    return found
