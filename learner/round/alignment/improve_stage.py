"""The stage that trains the policy, by the improver that is set."""

from collections.abc import Callable
from dataclasses import asdict

from pydantic import SecretStr

from learner.improve.base import ExperienceSource, Task
from learner.improve.dpo.votes import WeighedVotes
from learner.improve.improvers import make_improver
from learner.model.device import resolve_device
from learner.reward.base import RewardModel
from learner.reward.dataset import Dataset
from learner.round.start import load_start, start_directory
from learner.round.workspace import Workspace
from learner.workers.job import TrainingJob
from learner.workers.launch import train_by_workers
from server.store.learning.round_metrics import Improvement, RoundMetrics, StepMetrics

OnStep = Callable[[StepMetrics], None]


def improve_policy(work: Workspace, dataset: Dataset, reward_model: RewardModel) -> Improvement:
    """Trains the policy and leaves candidates in the round's directory; a resumed round may have done it already."""
    if work.done("improve") and work.round.metrics.improvement:
        return work.round.metrics.improvement
    settings = work.settings
    votes = WeighedVotes.of(dataset, settings.reward.label_smoothing) if settings.improver == "dpo" else None
    name, steps = settings.improver.upper(), settings.training.steps
    with (
        work.stages.stage("improve", f"improving the policy ({name})", steps) as advance,
        work.tensorboard() as writer,
    ):

        def on_step(step: StepMetrics) -> None:
            for name, value in asdict(step).items():
                writer.add_scalar(f"{settings.improver}/{name}", value, step.step)
            advance(1)

        improvement = train(work, votes, reward_model, on_step)
    work.record("improve", RoundMetrics(improvement=improvement))
    return improvement


def train(work: Workspace, votes: WeighedVotes | None, reward_model: RewardModel, on_step: OnStep) -> Improvement:
    """Trains in this process, or by workers."""
    settings = work.settings
    if settings.workers.count:
        return train_apart(work, votes, on_step)
    load_start(work)
    source = ExperienceSource(work.engine, work.prompts.train, settings.service_temperature, settings.seed)
    task = Task(work.policy, source, reward_model, work.budget, work.directory, on_step)
    return make_improver(settings, votes).improve(task)


def train_apart(work: Workspace, votes: WeighedVotes | None, on_step: OnStep) -> Improvement:
    """Trains by workers, whose machine's memory this process's models leave until they are needed again."""
    settings = work.settings
    # What is secret is of no use to workers, and a job may travel to other machines.
    told = {
        "learner_device": resolve_device(settings.learner_device).type,
        "store_url": SecretStr(""),
        "judge": settings.judge.model_copy(update={"api_key": SecretStr("")}),
    }
    job = TrainingJob(
        settings=settings.model_copy(update=told),
        dtype=work.dtype,
        reference=work.reference_directory,
        start=start_directory(work),
        reward_model=work.reward_model_directory,
        prompts=work.prompts.train,
        votes=votes,
        budget=work.budget,
        longest=work.longest_rollout,
        directory=work.directory,
    )
    work.release()

    def say(sentence: str) -> None:
        work.stages.console.print(sentence, highlight=False, markup=False)

    return train_by_workers(job, work.settings.workers, on_step, say)
