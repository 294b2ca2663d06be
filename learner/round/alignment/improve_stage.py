"""The stage that trains the policy, by the improver that is set."""

from dataclasses import asdict

from learner.improve.base import ExperienceSource, Improver, Task
from learner.improve.dpo.trainer import DPO
from learner.improve.dpo.votes import WeighedVotes
from learner.improve.ppo.trainer import PPO
from learner.improve.rloo.trainer import RLOO
from learner.reward.base import RewardModel
from learner.reward.dataset import Dataset
from learner.round.start import load_start
from learner.round.workspace import Workspace
from learner.settings import LearnerSettings
from server.store.learning.round_metrics import Improvement, RoundMetrics, StepMetrics


def improve_policy(work: Workspace, dataset: Dataset, reward_model: RewardModel) -> Improvement:
    """Trains the policy and leaves candidates in the round's directory; a resumed round may have done it already."""
    if work.done("improve") and work.round.metrics.improvement:
        return work.round.metrics.improvement
    settings = work.settings
    load_start(work)
    name, steps = settings.improver.upper(), settings.training.steps
    with (
        work.stages.stage("improve", f"improving the policy ({name})", steps) as advance,
        work.tensorboard() as writer,
    ):

        def on_step(step: StepMetrics) -> None:
            for name, value in asdict(step).items():
                writer.add_scalar(f"{settings.improver}/{name}", value, step.step)
            advance(1)

        source = ExperienceSource(work.engine, work.prompts.train, settings.service_temperature, settings.seed)
        task = Task(work.policy, source, reward_model, work.budget, work.directory, on_step)
        improvement = make_improver(settings, dataset).improve(task)
    work.record("improve", RoundMetrics(improvement=improvement))
    return improvement


def make_improver(settings: LearnerSettings, dataset: Dataset) -> Improver:
    """The improver that is set; `dataset` has the votes, for those that train on them."""
    match settings.improver:
        case "ppo":
            return PPO(settings.ppo, settings.policy)
        case "rloo":
            return RLOO(settings.rloo, settings.policy)
        case "dpo":
            return DPO(settings.dpo, settings.policy, WeighedVotes.of(dataset, settings.reward.label_smoothing))
