"""PPO's update: rewards per token, advantages by a critic, the clipped loss and the critic's."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from torch import Tensor

from learner.improve.adam import Adam
from learner.improve.base import Task
from learner.improve.policy_gradient import UpdateStats, update_policy
from learner.improve.ppo.critic import Critic, critic_features, make_critic, value_loss
from learner.improve.ppo.experience import ValuedExperience, to_experience
from learner.improve.step_metrics import step_metrics
from learner.improve.training import SampledBatch, Training, check_first_ratio, next_kl_coef, replace_cut
from learner.improve_settings import PolicySettings, PPOSettings
from learner.model.forward import Tokens
from learner.model.kl import masked_mean
from server.store.learning.round_metrics import Improvement, StepMetrics


class PPO:
    """An `Improver`: proximal policy optimisation (Schulman et al. 2017) with a KL penalty in the reward."""

    def __init__(self, settings: PPOSettings, policy_settings: PolicySettings) -> None:
        self._settings = settings
        self._policy_settings = policy_settings

    def improve(self, task: Task) -> Improvement:
        """See `Improver.improve`."""
        settings, critic = self._settings, make_critic(task.reward_model).to(task.policy.model.device)
        groups = [
            (task.policy.parameters, settings.learning_rate),
            (list(critic.parameters()), settings.critic_learning_rate),
        ]
        optimizer = Adam(groups, settings.adam_epsilon, task.policy.group)
        kl_target = settings.kl_target + task.budget.moved
        prefix = partial(critic_features, reward_model=task.reward_model)
        training = Training(task, settings, self._policy_settings, settings.epochs, settings.minibatches, prefix)

        def update(batch: SampledBatch, steps: list[StepMetrics]) -> StepMetrics:
            kl_coef = next_kl_coef(steps, settings, kl_target, task.budget)
            return self._update(training, critic, optimizer, batch, kl_coef, len(steps))

        return training.run(optimizer, task.source.batches(settings.episodes), update, kl_target)

    def _update(
        self, training: Training, critic: Critic, optimizer: Adam, batch: SampledBatch, kl_coef: float, number: int
    ) -> StepMetrics:
        """Makes one update on the batch; returns the step's metrics."""
        settings, reward_model = self._settings.at_length(batch.length), training.task.reward_model
        scores = reward_model.clipped(reward_model.scores(batch.judged.features))
        scores = replace_cut(scores, batch.rollout, settings.missing_eos_score)
        experience = to_experience(batch.rollout, batch.judged, batch.old_logprobs, scores, critic, kl_coef, settings)
        budget = self._policy_settings.micro_batch_tokens
        optimizer.set_learning_rate(0, settings.learning_rate)
        stats = ppo_update(
            training.logprobs_of, critic, optimizer, experience, settings, batch.passes, budget, training.sharing
        )
        check_first_ratio(stats.first_ratio_error)
        mask, figures = batch.rollout.tokens.response_mask, asdict(stats)
        return step_metrics(
            batch,
            reward_model,
            step=number,
            kl_coef=kl_coef,
            value_loss=figures.pop("other_loss") / settings.vf_coef,
            explained_variance=explained_variance(experience.values, experience.returns, mask),
            **figures,
        )


def ppo_update(
    logprobs_of: Callable[[Tokens], Tensor],
    critic: Critic,
    optimizer: Adam,
    batch: ValuedExperience,
    settings: PPOSettings,
    passes: list[list[Tensor]],
    budget: int,
    sharing: bool,
) -> UpdateStats:
    """`update_policy` with the critic's loss beside the policy's, weighted by vf_coef."""

    def critic_loss(rows: Tensor, columns: int, token_count: Tensor) -> Tensor:
        features, values, returns, mask = (
            each[rows, :columns]
            for each in (batch.prefix_features, batch.values, batch.returns, batch.tokens.response_mask)
        )
        return settings.vf_coef * value_loss(critic(features), values, returns, mask, token_count, settings.value_clip)

    return update_policy(logprobs_of, optimizer, batch, settings, passes, budget, sharing, critic_loss)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns] over the valid tokens: 0 means that the critic predicts nothing."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    return float(1 - variance(returns - values) / variance(returns).clamp(min=1e-8))
