"""RLOO: several answers to each prompt, each compared with the mean of the others, and no critic."""

from collections.abc import Iterator
from dataclasses import asdict

from torch import Tensor

from learner.improve.adam import Adam
from learner.improve.base import ExperienceSource, Task
from learner.improve.policy_gradient import Experience, update_policy
from learner.improve.step_metrics import step_metrics
from learner.improve.training import SampledBatch, Training, check_first_ratio, next_kl_coef, replace_cut
from learner.improve_settings import PolicySettings, RLOOSettings
from learner.model.kl import kl_k1
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import Improvement, StepMetrics


class RLOO:
    """An `Improver`: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024), the KL penalty in the reward and
    PPO's clip."""

    def __init__(self, settings: RLOOSettings, policy_settings: PolicySettings) -> None:
        self._settings = settings
        self._policy_settings = policy_settings

    def improve(self, task: Task) -> Improvement:
        """See `Improver.improve`."""
        settings = self._settings
        optimizer = Adam([(task.policy.parameters, settings.learning_rate)], settings.adam_epsilon, task.policy.group)
        kl_target = settings.kl_target + task.budget.moved
        training = Training(task, settings, self._policy_settings, settings.epochs, settings.minibatches)

        def update(batch: SampledBatch, steps: list[StepMetrics]) -> StepMetrics:
            return self._update(
                training, optimizer, batch, next_kl_coef(steps, settings, kl_target, task.budget), len(steps)
            )

        return training.run(optimizer, repeated(task.source, settings), update, kl_target)

    def _update(
        self, training: Training, optimizer: Adam, batch: SampledBatch, kl_coef: float, number: int
    ) -> StepMetrics:
        """Makes one update on the batch; returns the step's metrics."""
        settings, reward_model = self._settings.at_length(batch.length), training.task.reward_model
        tokens, mask = batch.rollout.tokens, batch.rollout.tokens.response_mask
        scores = reward_model.clipped(reward_model.scores(batch.judged.features))
        scores = replace_cut(scores, batch.rollout, settings.missing_eos_score).to(mask.device)
        kl = kl_k1(batch.old_logprobs, batch.judged.ref_logprobs).sum(dim=1)
        advantages = leave_one_out(scores - kl_coef * kl, settings.answers)[:, None].expand(mask.shape)
        experience = Experience(tokens, batch.old_logprobs, batch.rollout.behavior_logprobs, advantages)
        budget = self._policy_settings.micro_batch_tokens
        optimizer.set_learning_rate(0, settings.learning_rate)
        stats = update_policy(
            training.logprobs_of, optimizer, experience, settings, batch.passes, budget, training.sharing
        )
        check_first_ratio(stats.first_ratio_error)
        figures = asdict(stats)
        del figures["other_loss"]
        return step_metrics(batch, reward_model, step=number, kl_coef=kl_coef, **figures)


def repeated(source: ExperienceSource, settings: RLOOSettings) -> Iterator[list[Prompt]]:
    """Batches in which each prompt comes `answers` times in a row."""
    for prompts in source.batches(settings.episodes // settings.answers):
        yield [prompt for prompt in prompts for _ in range(settings.answers)]


def leave_one_out(rewards: Tensor, answers: int) -> Tensor:
    """(B,) each reward minus the mean of the other rewards of its prompt, whose `answers` rewards are in a row
    (Kool et al. 2019)."""
    groups = rewards.reshape(-1, answers)
    return ((groups - groups.mean(dim=1, keepdim=True)) * answers / (answers - 1)).flatten()
