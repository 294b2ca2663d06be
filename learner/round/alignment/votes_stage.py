"""The votes that a round reads, and the features of their answers."""

from contextlib import closing

from torch import Tensor

from learner.model.features import FeatureCache, TokenPair
from learner.process import package_versions
from learner.reward.dataset import Dataset, to_dataset
from learner.round.workspace import Workspace
from server.store.files.residue import cache_directory, sweep
from server.store.learning.round_metrics import PromptCounts, RoundMetrics, VoteCounts


def read_votes(work: Workspace) -> Dataset:
    """The votes of the snapshot."""
    return to_dataset(
        work.snapshot,
        work.round.create_time,
        work.settings.gate.judge_share,
        work.settings.reward,
        work.text.answer,
        work.longest,
        work.text.embeddings,
    )


def load_feedback(work: Workspace) -> Dataset:
    """The votes that the round learns from; records how many there are, and which."""
    dataset = read_votes(work)
    if dataset.left_out:
        work.stages.console.print(
            f"left out: {dataset.left_out} votes on answers without tokens, with more than {work.longest} including "
            "the prompt, or with tokens that the model lacks, and corrections that change nothing",
            highlight=False,
        )
    if not work.done("reward_model"):
        votes = VoteCounts(
            choices=len(work.snapshot.choices),
            thumbs=len(work.snapshot.thumbs),
            corrections=int((~dataset.compared & ~dataset.by_machine[: len(dataset.compared)]).sum()),
            train=len(dataset.train),
            judge=len(dataset.judge),
            machine=int(dataset.by_machine.sum()),
            left_out=dataset.left_out,
            quarantined=work.store.snapshots.votes_of(work.round.quarantined, work.round.watermark),
        )
        prompts = PromptCounts(len(work.prompts.train), len(work.prompts.held_out), work.prompts.own)
        work.store.lineage.set_round_votes(work.round.id, dataset.sides, fence=work.lease)
        work.record("snapshot", RoundMetrics(votes=votes, prompts=prompts, versions=package_versions()))
    return dataset


def extract_features(work: Workspace, dataset: Dataset) -> Tensor:
    """Features (N, F) of every voted answer."""
    return read_answers(work, dataset.answers, "reading the voted answers")


def read_answers(work: Workspace, answers: list[TokenPair], what: str) -> Tensor:
    """Features (N, F) of answers, from the cache or the reference."""
    directory = cache_directory(work.settings.data_dir, work.snapshot.deletions)
    with (
        closing(FeatureCache.open(directory, work.reference_sha256, work.spec, work.dtype)) as cache,
        work.policy.reference() as reference,
        work.stages.stage("features", what, len(answers)) as advance,
    ):
        features = cache.get(answers, reference, work.spec, work.settings.policy.micro_batch_tokens, advance)
    # An answer may have been deleted in the meantime.
    sweep(work.settings.data_dir)
    return features
