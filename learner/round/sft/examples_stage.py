"""The demonstrations and corrections that a round learns from."""

from learner.improve.sft.examples import Split, split, to_examples, usable_corrections
from learner.process import package_versions
from learner.round.workspace import Workspace
from learner.settings import LearnerSettings
from server.store.chats.records import Correction, Demonstration, Snapshot
from server.store.files.manifest import read_manifest
from server.store.learning.round_metrics import PromptCounts, RoundMetrics
from server.store.store import Store


def usable(snapshot: Snapshot, settings: LearnerSettings) -> list[Demonstration | Correction]:
    """The demonstrations, and the corrections that may train."""
    return [*snapshot.demonstrations, *usable_corrections(snapshot, settings.gate.judge_share)]


def new_examples(store: Store, settings: LearnerSettings) -> int:
    """How many demonstrations and corrections no round has learned from yet, without users in quarantine."""
    snapshot = store.snapshots.take(None, settings.max_votes, sorted(store.quarantine.current()))
    return count_new(store, snapshot, settings)


def count_new(store: Store, snapshot: Snapshot, settings: LearnerSettings) -> int:
    """How many of these are newer than the last round that learned from such."""
    last = store.rounds.last_fine_tuned()
    return sum(one.event_seq > (last.watermark if last else 0) for one in usable(snapshot, settings))


def nothing_to_imitate(store: Store, snapshot: Snapshot, settings: LearnerSettings) -> str | None:
    """Why no round can learn from demonstrations now, in a sentence; None if one can."""
    if not usable(snapshot, settings):
        return "There are no demonstrations or corrections yet; nothing was changed."
    if not count_new(store, snapshot, settings):
        return "There are no new demonstrations or corrections; nothing was changed."
    active = store.policies.active()
    manifest = read_manifest(settings.data_dir / "policies" / active.version)
    adapter = settings.policy.train == "lora"
    if active.version != active.reference_version and (manifest.kind == "adapter") != adapter:
        return (
            f"The active {active.version} is of the kind {manifest.kind}, but policy.train is {settings.policy.train}: "
            "change policy.train. Nothing was changed."
        )
    return None


def load_examples(work: Workspace) -> Split:
    """The examples to train on and those held out; records which they are."""
    settings, snapshot = work.settings, work.snapshot
    corrections = usable_corrections(snapshot, settings.gate.judge_share)
    examples = to_examples(snapshot.demonstrations, corrections, work.text.prompt, work.text.answer, work.longest)
    found = split(examples, work.store.lineage.imitated(), settings.sft, settings.reward.user_share)
    if not work.done("improve"):
        prompts = PromptCounts(len(work.prompts.train), len(work.prompts.held_out), work.prompts.own)
        work.store.lineage.set_round_votes(work.round.id, found.sides, fence=work.lease)
        work.record("snapshot", RoundMetrics(prompts=prompts, versions=package_versions()))
    return found
