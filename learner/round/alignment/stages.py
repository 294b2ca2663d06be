"""The stages of a round that learns from votes: reward model -> improvement -> gate -> publish -> activate."""

from dataclasses import asdict

from torch import Tensor

from learner.model.rollout import draw_seed
from learner.reward import linear_reward_model as scoring
from learner.reward import voter_reliability
from learner.reward.dataset import Dataset
from learner.reward.linear_reward_model import LinearRewardModel
from learner.round.alignment.imports_stage import read_imports
from learner.round.alignment.improve_stage import improve_policy
from learner.round.alignment.signal_stage import test_signal
from learner.round.alignment.votes_stage import extract_features, load_feedback
from learner.round.end import Outcome, finish
from learner.round.gate.checks_stage import unusable_checks
from learner.round.gate.gate_stage import judge_candidates
from learner.round.preconditions import no_candidate, too_few_prompts, too_few_votes, too_little
from learner.round.publish import activate, publish
from learner.round.report import Report
from learner.round.review.active_pairs import offer_active_pairs
from learner.round.start import compare_engine
from learner.round.workspace import Workspace, spread
from server.store.files.manifest import new_version, verify
from server.store.files.sharing import share
from server.store.learning.round_metrics import RewardModelMetrics, RoundMetrics, VoterWeights


def run(work: Workspace) -> Report:
    """Runs the stages in order."""
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
    imported = read_imports(work)
    with work.stages.stage("reward_model", "fitting the reward model"):
        generator = work.generator(2)
        model = LinearRewardModel.fit(features, dataset.train, work.spec, work.settings.reward, generator, imported)
        held_out = scoring.evaluate(model, features, dataset.judge)
    # The reference's own answers at the service temperature give the score its zero and its unit.
    prompts = spread(work.prompts.train, work.settings.reward.reference_answers)
    with work.stages.stage("reward_model", "scoring reference answers"):
        work.engine.push(work.policy.reference_weights())
        samples = work.engine.sample(prompts, draw_seed(work.settings.seed, 0))
    model = model.standardised(work.features_of(samples, model.spec), work.prompt_states(prompts, model.spec))
    version = work.round.reward_model_version or work.free_version("reward_models", "rm")
    work.update(reward_model_version=version)
    directory, reference = work.reward_model_directory, work.round.reference_version
    # It already exists if the round was killed after the rename.
    if not directory.exists():
        with new_version(directory, kind="full", reference_version=reference, info={"round_id": work.round.id}) as new:
            model.save(new)
    verify(directory)
    share(work.store, work.settings.data_dir, "reward_models", version, fence=work.lease)
    figures = RewardModelMetrics(
        **asdict(held_out),
        temperature_effect=model.temperature,
        l2=model.l2,
        score_low=model.low,
        score_high=model.high,
        imported=len(imported) if imported else 0,
        prior_weight=model.prior_weight,
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
