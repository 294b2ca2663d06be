"""The PPO loop: push, sample, score, advantages, update; it saves candidates and a state to resume from.

A step involves three policies: mu, the engine that sampled; pi_old, the trainer before its update; pi_theta, the
trainer during its update. Every step checks that the weights pushed are the weights sampled from. A step's draws depend
only on the seed and its number, so a killed loop resumes from its last state (`learner.improve.ppo.state`) as if it had
not been killed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from learner.improve.base import ExperienceSource
from learner.improve.budget import Budget
from learner.improve.candidates import candidate, candidates, drop_candidates
from learner.improve.ppo.adam import Adam
from learner.improve.ppo.advantages import adapt_kl_coef
from learner.improve.ppo.experience import judge_rollout, make_critic, to_experience
from learner.improve.ppo.state import load_state, save_state
from learner.improve.ppo.update import Critic, UpdateStats, draw_minibatches, ppo_update
from learner.improve_settings import PolicySettings, PPOSettings
from learner.model.forward import Tokens, run_trunk, shares_prefix, token_logprobs
from learner.model.kl import kl_k1, masked_mean
from learner.model.mismatch import PUSH_ANSWERS, Mismatch, check_push, mismatch
from learner.model.passes import ReferencePass, policy_logprobs
from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout, draw_generator
from learner.reward.base import RewardModel
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import EndedBy, Improvement, StepMetrics

# Mean |log pi_theta / pi_old| in nats, before the first update, above which the two are not the same policy.
MAX_FIRST_RATIO_ERROR = 0.05


@dataclass(frozen=True)
class SampledBatch:
    """A rollout batch before its update. old_logprobs (B, T) are pi_old's; `kl` is the mean sequence KL to the
    reference in nats."""

    rollout: Rollout
    passes: list[list[Tensor]]
    judged: ReferencePass
    old_logprobs: Tensor
    gap: Mismatch
    kl: float

    @property
    def length(self) -> float:
        """The mean length of its answers, in tokens."""
        return float(self.rollout.tokens.response_mask.sum(dim=1).float().mean())


class PPO:
    """An `Improver`: proximal policy optimisation (Schulman et al. 2017) with a KL penalty in the reward.

    Training ends when `steps` are done, the sequence KL exceeds its budget or the score's uncertainty outgrows its
    gain."""

    def __init__(self, settings: PPOSettings, policy_settings: PolicySettings) -> None:
        self._settings = settings
        self._policy_settings = policy_settings

    def improve(
        self,
        policy: TrainablePolicy,
        source: ExperienceSource,
        reward_model: RewardModel,
        budget: Budget,
        directory: Path,
        on_step: Callable[[StepMetrics], None],
    ) -> Improvement:
        """See `Improver.improve`."""
        settings, critic = self._settings, make_critic(reward_model).to(policy.model.device)
        rates = (policy.parameters, settings.learning_rate), (list(critic.parameters()), settings.critic_learning_rate)
        optimizer = Adam(list(rates), settings.adam_epsilon)
        steps = [StepMetrics(**step) for step in load_state(directory, optimizer)]
        drop_candidates(directory, after=len(steps))
        for step in steps:
            on_step(step)

        ended_by: EndedBy = "steps"
        kl_target = settings.kl_target + budget.moved
        batches = islice(source.batches(settings.episodes), len(steps), None)
        for number in range(len(steps), settings.steps):
            if outgrown(steps, settings.patience):
                ended_by = "uncertainty"
                break
            batch = self._sample(policy, source, reward_model, next(batches), number)
            if batch.kl > budget.of(batch.length):
                # The weights that were just sampled from exceed the budget: they are no candidate.
                drop_candidates(directory, after=number - 1)
                ended_by = "kl_budget"
                break
            kl_coef = next_kl_coef(steps, settings, kl_target)
            steps.append(self._update(policy, critic, optimizer, reward_model, batch, kl_coef, source, number))
            self._keep(policy, optimizer, steps, directory)
            on_step(steps[-1])
        return Improvement(steps, candidates(directory), ended_by, kl_target, budget.kl)

    def _sample(
        self,
        policy: TrainablePolicy,
        source: ExperienceSource,
        reward_model: RewardModel,
        prompts: list[Prompt],
        number: int,
    ) -> SampledBatch:
        """Samples answers of the current policy and passes them through the reference and the trainer. Raises
        RuntimeError if the engine cannot have had these weights."""
        rollout = source.rollout(policy, prompts, number + 1)
        tokens, budget, exact = rollout.tokens, self._policy_settings.micro_batch_tokens, _exact(policy)
        # Every pass over the rollout is split into the micro-batches of the update's first pass: in bfloat16 a row's
        # log-probabilities depend on the other rows of its micro-batch, and pi_theta must start as pi_old.
        passes = draw_minibatches(tokens, self._settings, draw_generator(source.seed, number))
        judged = judge_rollout(policy, reward_model, rollout, source.temperature, budget, passes[0])
        # In float32 the engine and the trainer differ too little to matter to PPO: pi_old is mu, and a pass over some
        # answers is enough to check the push.
        rows = torch.arange(len(tokens), device=policy.model.device)[: PUSH_ANSWERS if exact else None]
        seen = policy_logprobs(policy, tokens, source.temperature, budget, [rows] if exact else passes[0])
        gap = mismatch(seen[rows], rollout.behavior_logprobs[rows], tokens.response_mask[rows])
        check_push(gap, self._policy_settings.mismatch_limit, policy.model.dtype)
        if number == 0 and self._policy_settings.start_from == "reference":
            check_start(seen[rows], judged.ref_logprobs[rows])
        old_logprobs = rollout.behavior_logprobs if exact else seen
        kl = float(kl_k1(old_logprobs, judged.ref_logprobs).sum(dim=1).mean())
        return SampledBatch(rollout, passes, judged, old_logprobs, gap, kl)

    def _update(
        self,
        policy: TrainablePolicy,
        critic: Critic,
        optimizer: Adam,
        reward_model: RewardModel,
        batch: SampledBatch,
        kl_coef: float,
        source: ExperienceSource,
        number: int,
    ) -> StepMetrics:
        """Makes one update on the batch; returns the step's metrics."""

        def logprobs_of(part: Tokens) -> Tensor:
            hidden, _ = run_trunk(policy.model, part)
            return token_logprobs(policy.model, hidden, part, source.temperature)

        settings = self._settings.at_length(batch.length)
        raw = reward_model.scores(batch.judged.features)
        scores = replace_cut(reward_model.clipped(raw), batch.rollout, settings.missing_eos_score)
        experience = to_experience(batch.rollout, batch.judged, batch.old_logprobs, scores, critic, kl_coef, settings)
        budget, sharing = self._policy_settings.micro_batch_tokens, shares_prefix(policy.model)
        optimizer.set_learning_rate(0, settings.learning_rate)
        stats = ppo_update(logprobs_of, critic, optimizer, experience, settings, batch.passes, budget, sharing)
        if stats.first_ratio_error > MAX_FIRST_RATIO_ERROR:
            raise RuntimeError(
                f"pi_theta differed from pi_old by {stats.first_ratio_error:.3f} nats per token before its update."
            )
        mask = batch.rollout.tokens.response_mask
        variance = explained_variance(experience.values, experience.returns, mask)
        return step_metrics(number, batch, raw, reward_model, kl_coef, variance, stats)

    def _keep(self, policy: TrainablePolicy, optimizer: Adam, steps: list[StepMetrics], directory: Path) -> None:
        """Saves the candidate and the state after these steps, if they are due."""
        settings, done = self._settings, len(steps)
        if done % settings.save_every == 0 or done == settings.steps:
            policy.save(candidate(directory, done))
        if done % settings.checkpoint_every == 0:
            save_state(directory, [asdict(step) for step in steps], optimizer)


def step_metrics(
    number: int,
    batch: SampledBatch,
    raw: Tensor,
    reward_model: RewardModel,
    kl_coef: float,
    variance: float,
    stats: UpdateStats,
) -> StepMetrics:
    """The metrics of a step whose answers scored `raw` (B,), before any score was replaced or clipped."""
    mask = batch.rollout.tokens.response_mask
    return StepMetrics(
        step=number,
        score=float(raw.mean()),
        score_sd=float(raw.std()),
        uncertainty=reward_model.uncertainty(batch.judged.features),
        clipped_share=float((raw != reward_model.clipped(raw)).float().mean()),
        kl=batch.kl,
        kl_coef=kl_coef,
        # Over the sampled tokens: an unbiased estimate that needs no other token's probability.
        entropy=float(masked_mean(-batch.old_logprobs, mask)),
        length=batch.length,
        ended=float(batch.rollout.ended.float().mean()),
        explained_variance=variance,
        **{f"mismatch_{name}": value for name, value in asdict(batch.gap).items()},
        **asdict(stats),
    )


def next_kl_coef(steps: list[StepMetrics], settings: PPOSettings, kl_target: float) -> float:
    """The penalty's weight after the steps so far."""
    if not steps:
        return settings.kl_coef
    last = steps[-1]
    return adapt_kl_coef(last.kl_coef, last.kl, kl_target, settings.kl_horizon, settings.episodes)


def outgrown(steps: list[StepMetrics], patience: int) -> bool:
    """Whether score minus uncertainty was best more than `patience` steps ago: since then the disagreement between the
    members of the reward model has grown by more than the score."""
    sure = [step.score - step.uncertainty for step in steps]
    return len(sure) - sure.index(max(sure)) > patience + 1 if sure else False


def replace_cut(scores: Tensor, rollout: Rollout, missing_eos_score: float | None) -> Tensor:
    """Scores (B,), with a replacement for answers that the length limit cut, if one is set."""
    return scores if missing_eos_score is None else torch.where(rollout.ended, scores, missing_eos_score)


def check_start(old_logprobs: Tensor, ref_logprobs: Tensor) -> None:
    """Raises RuntimeError if the policy, which starts from the reference, differs from it."""
    difference = float((old_logprobs - ref_logprobs).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"The policy differs from its reference by {difference:.4f} nats before its first update.")


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns] over the valid tokens: 0 means that the critic predicts nothing."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    return float(1 - variance(returns - values) / variance(returns).clamp(min=1e-8))


def _exact(policy: TrainablePolicy) -> bool:
    return bool(policy.model.dtype == torch.float32)
