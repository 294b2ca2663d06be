"""One round: snapshot -> reward model -> improvement -> gate -> publish -> activate.

Each stage ends with one fenced write that records it. `run_once` resumes after the last recorded stage, so a round may
be killed anywhere. A stage's output is on disk before the stage is recorded: the reward model under `reward_models/`,
candidates and TensorBoard files under `rounds/<id>/`, the version under `policies/`. A round that raises is recorded as
failed, and the served policy is unchanged.
"""

import json
import math
from contextlib import closing
from dataclasses import asdict
from typing import Literal

from torch import Tensor

from learner.model.device import require_memory, resolve_device
from learner.model.engine_check import check_engine
from learner.model.features import FeatureCache
from learner.model.rollout import draw_seed
from learner.process import package_versions, return_large_blocks
from learner.progress import Stages
from learner.reward import linear_reward_model as scoring
from learner.reward import voter_reliability
from learner.reward.dataset import Dataset, to_dataset
from learner.reward.linear_reward_model import LinearRewardModel
from learner.round.begin import begin
from learner.round.gate.checks_stage import unusable_checks
from learner.round.gate.gate_stage import judge_candidates
from learner.round.improve_stage import improve_policy
from learner.round.lease import learner_lease
from learner.round.preconditions import no_candidate, too_few_prompts, too_few_votes, too_little
from learner.round.publish import activate, publish
from learner.round.report import Report
from learner.round.resume import began_with, change_dtype, resumable
from learner.round.retention import prune
from learner.round.review.active_pairs import offer_active_pairs
from learner.round.signal_stage import test_signal
from learner.round.workspace import Workspace, spread
from learner.settings import LearnerSettings
from server.shared.model.dtype import resolve_dtype
from server.store.files.manifest import new_version, verify
from server.store.files.residue import cache_directory, sweep
from server.store.learning.records import Lease
from server.store.learning.round_metrics import (
    PromptCounts,
    RewardModelMetrics,
    RoundMetrics,
    VoteCounts,
    VoterWeights,
)
from server.store.store import Store

Outcome = Literal["promoted", "canary", "rejected"]
# Settings that a resumed round takes from the machine that resumes it.
THIS_MACHINES = ("data_dir", "dtype", "learner_device", "learner_gpu_memory_share")


def run_once(settings: LearnerSettings, stages: Stages, *, wait: bool = False) -> Report:
    """Runs or resumes one round; with `wait`, waits while another learner is running."""
    if not Store.exists(settings.data_dir):
        return Report("nothing", f"There is no data in {str(settings.data_dir)!r} yet: start `server serve` and vote.")
    store = Store.open(settings.data_dir)
    try:
        with learner_lease(store, settings.data_dir, settings.lease_seconds, wait=wait) as lease:
            if lease is None:
                return Report("nothing", "Another learner is running on this data directory; nothing was done.")
            report = _run_or_resume(store, lease, settings, stages)
            prune(store, settings.data_dir, settings.keep_versions, fence=lease)
            return report
    finally:
        store.close()


def _run_or_resume(store: Store, lease: Lease, settings: LearnerSettings, stages: Stages) -> Report:
    dtype, device = resolve_dtype(settings.dtype), resolve_device(settings.learner_device)
    require_memory(settings.server_gpu_memory_share, settings.learner_gpu_memory_share)
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
    snapshot = (
        store.snapshots.take(
            current.watermark, settings.max_votes, quarantined, current.judge, current.machine_watermark
        )
        if current
        else store.snapshots.take(None, settings.max_votes, quarantined, settings.judge.name)
    )
    if settings.skip_rolled_back:
        before = current.create_time if current else math.inf
        snapshot = snapshot.without(store.lineage.rolled_back(before))
    if current is None:
        stages.console.print(f"computing in {dtype} on {device}", highlight=False)
        begun = begin(store, lease, settings, stages, snapshot, quarantined)
        if isinstance(begun, str):
            return Report("nothing", begun)
        current, settings = begun
    if settings.policy.checkpoint_activations == "on" and device.type == "cpu":
        return_large_blocks()
    work = Workspace(store, lease, settings, stages, current, snapshot)
    try:
        return run(work)
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


def run(work: Workspace) -> Report:
    """Runs the stages in order."""
    work.directory.mkdir(parents=True, exist_ok=True)
    dataset = load_feedback(work)
    train = len(dataset.train) - int(dataset.by_machine.sum())
    reason = too_few_votes(train, len(dataset.judge)) or too_few_prompts(work.prompts) or unusable_checks(work)
    if reason:
        return finish(work, "rejected", reason)
    compare_engine(work)
    features = extract_features(work, dataset)
    signal = test_signal(work, dataset, features)
    if not signal.passed:
        return finish(work, "rejected", too_little(signal))
    # Only after the test: weights chosen so that votes agree would let meaningless votes pass it.
    dataset, voters = weigh_voters(work, dataset, features)
    reward_model = fit_reward_model(work, dataset, features, voters)
    report = finish(work, *improve_and_judge(work, dataset, features, reward_model))
    offer_pairs(work, reward_model)
    return report


def improve_and_judge(
    work: Workspace, dataset: Dataset, features: Tensor, reward_model: LinearRewardModel
) -> tuple[Outcome, str]:
    """Improves the policy and decides about the best candidate. Returns the round's state and a sentence about it."""
    improvement = improve_policy(work, dataset, reward_model)
    if not improvement.candidates:
        return "rejected", no_candidate(improvement)
    verdict = judge_candidates(work, dataset, features, reward_model, improvement)
    return activate(work, publish(work, verdict), verdict)


def load_feedback(work: Workspace) -> Dataset:
    dataset = to_dataset(
        work.snapshot,
        work.round.create_time,
        work.settings.gate.judge_share,
        work.settings.reward,
        work.text.answer,
        work.longest,
        work.text.embeddings,
    )
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


def compare_engine(work: Workspace) -> None:
    """Before anything is spent: is what will be trained what is served?"""
    if not work.done("reward_model"):
        policy, engine = work.policy, work.engine
        with work.stages.stage("start", "comparing the engine with the trainer"):
            check_engine(policy, engine, work.prompts.train, work.settings)


def extract_features(work: Workspace, dataset: Dataset) -> Tensor:
    """Features (N, F) of every voted answer, from the cache or the reference."""
    directory = cache_directory(work.settings.data_dir, work.snapshot.deletions)
    with (
        closing(FeatureCache.open(directory, work.reference_sha256, work.spec, work.dtype)) as cache,
        work.policy.reference() as reference,
        work.stages.stage("features", "reading the voted answers", len(dataset.answers)) as advance,
    ):
        features = cache.get(dataset.answers, reference, work.spec, work.settings.policy.micro_batch_tokens, advance)
    # An answer may have been deleted in the meantime.
    sweep(work.settings.data_dir)
    return features


def weigh_voters(work: Workspace, dataset: Dataset, features: Tensor) -> tuple[Dataset, VoterWeights | None]:
    """Reduces the weight of voters who answer against the others, and counts them. A resumed round computes it again,
    with the same result."""
    if not work.settings.reward.weigh_voters:
        return dataset, None
    with work.stages.stage("voters", "comparing voters with each other"):
        weighed, factors = voter_reliability.weigh_voters(
            dataset, features, work.spec, work.settings.reward, work.generator(5)
        )
    people = factors[dataset.voters[~dataset.by_machine].unique()]
    return weighed, VoterWeights(len(people), int((people < 0.5).sum()), float(people.mean()))


def fit_reward_model(
    work: Workspace, dataset: Dataset, features: Tensor, voters: VoterWeights | None
) -> LinearRewardModel:
    if work.done("reward_model"):
        directory = work.reward_model_directory
        verify(directory)
        return LinearRewardModel.load(directory)
    with work.stages.stage("reward_model", "fitting the reward model"):
        model = LinearRewardModel.fit(features, dataset.train, work.spec, work.settings.reward, work.generator(2))
        held_out = scoring.evaluate(model, features, dataset.judge)
    # The reference's own answers at the service temperature give the score its zero and its unit.
    prompts = spread(work.prompts.train, work.settings.reward.reference_answers)
    with work.stages.stage("reward_model", "scoring reference answers"):
        work.engine.push(work.policy.reference_weights())
        samples = work.engine.sample(prompts, draw_seed(work.settings.seed, 0))
    model = model.standardised(work.features_of(samples, model), work.prompt_states(prompts, model))
    version = work.round.reward_model_version or work.free_version("reward_models", "rm")
    work.update(reward_model_version=version)
    directory, reference = work.reward_model_directory, work.round.reference_version
    # It already exists if the round was killed after the rename.
    if not directory.exists():
        with new_version(directory, kind="full", reference_version=reference, info={"round_id": work.round.id}) as new:
            model.save(new)
    verify(directory)
    figures = RewardModelMetrics(
        **asdict(held_out),
        temperature_effect=model.temperature,
        l2=model.l2,
        score_low=model.low,
        score_high=model.high,
    )
    metrics = RoundMetrics(voters=voters, reward_model=figures)
    work.store.reward_models.register(
        version,
        reference_version=reference,
        round_id=work.round.id,
        metrics=metrics.to_json()["reward_model"],
        fence=work.lease,
    )
    work.record("reward_model", metrics)
    return LinearRewardModel.load(directory)


def offer_pairs(work: Workspace, reward_model: LinearRewardModel) -> None:
    """Offers people pairs to learn from. The round has ended: whatever happens here, its outcome stands."""
    try:
        offer_active_pairs(work, reward_model)
    except Exception as error:
        work.stages.console.print(f"No pairs to learn from are offered: {error}", highlight=False, markup=False)


def finish(work: Workspace, state: Outcome, sentence: str) -> Report:
    """Closes the round, in the store and in `report.json`."""
    work.clean()
    work.record("activate" if state == "promoted" else work.round.stage)
    # A canary's round is stored as rejected until it is promoted; whoever reads it sees that it waits.
    ended: Literal["promoted", "rejected"] = "promoted" if state == "promoted" else "rejected"
    work.round = work.store.rounds.finish(work.round.id, ended, reason=sentence, fence=work.lease)
    report = Report(
        state,
        sentence,
        work.round.id,
        work.round.policy_version,
        work.round.reward_model_version,
        work.round.incumbent_version,
        work.round.metrics,
    )
    (work.directory / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report
