"""The PPO loop: push, sample, score, advantages, update; candidates along the way, and a state to go on from.

Three policies meet in a step: mu, the engine that sampled; pi_old, the trainer before its update; pi_theta, while it
steps. Every step proves that the weights pushed are the weights sampled from. What a step draws follows from the seed
and its number alone, so a loop that was killed goes on from its last state (`learner.improve.ppo.state`) as if it had
not been.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from learner.improve.ppo.advantages import adapt_kl_coef, kl_k1, masked_mean
from learner.improve.ppo.experience import judge_rollout, make_critic, policy_logprobs, to_experience
from learner.improve.ppo.losses import Adam, Mismatch, draw_minibatches, mismatch, ppo_update
from learner.improve.ppo.state import load_state, save_state
from learner.model.forward import Tokens, run_trunk, token_logprobs
from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout, RolloutEngine, draw_generator, draw_seed, to_rollout
from learner.reward.reward_model import LinearRewardModel
from learner.settings import PPOSettings
from server.store.chats.records import Prompt

# Root mean square of log pi_old / mu, several times what was measured where the weights are the same
# (docs/decisions/0026-every-cpu.md).
MISMATCH_LIMITS = {torch.bfloat16: 0.35, torch.float32: 0.005}
# Answers that show whether a push landed.
PUSH_ANSWERS = 8


@dataclass(frozen=True)
class StepFigures:
    """One step, as it is logged. KL in nats a response, entropy in nats a token, lengths in tokens."""

    step: int
    score: float
    score_sd: float
    uncertainty: float
    clipped_share: float
    kl: float
    kl_coef: float
    entropy: float
    length: float
    ended: float
    explained_variance: float
    policy_loss: float
    value_loss: float
    approx_kl: float
    clipfrac: float
    grad_norm: float
    optimizer_steps: int
    first_ratio_error: float
    mismatch_rms: float
    mismatch_kl: float
    mismatch_effective_share: float
    mismatch_outside: float


@dataclass(frozen=True)
class Training:
    """What PPO came to: a figure of every step, the steps whose weights were kept, and why it ended."""

    figures: list[StepFigures]
    candidates: list[int]
    ended_by: str


def train(
    policy: TrainablePolicy,
    reward_model: LinearRewardModel,
    engine: RolloutEngine,
    prompts: list[Prompt],
    directory: Path,
    settings: PPOSettings,
    temperature: float,
    seed: int,
    on_step: Callable[[StepFigures], None],
) -> Training:
    """PPO until `steps` are done, the sequence KL exceeds its budget or the score's uncertainty outgrows its gain.

    Goes on from the state in `directory`, where candidates are saved as `step-NNN`, too."""
    critic = make_critic(reward_model)
    optimizer = Adam(
        [(policy.parameters, settings.learning_rate), (list(critic.parameters()), settings.critic_learning_rate)],
        settings.adam_epsilon,
    )
    figures = [StepFigures(**step) for step in load_state(directory, optimizer)]
    drop_candidates(directory, after=len(figures))
    for step in figures:
        on_step(step)

    def logprobs_of(part: Tokens) -> Tensor:
        hidden, _ = run_trunk(policy.model, part)
        return token_logprobs(policy.model, hidden, part, temperature)

    ended_by = "steps"
    batches = islice(prompt_batches(prompts, settings.episodes, seed), len(figures), None)
    for number in range(len(figures), settings.steps):
        if outgrown(figures, settings.patience):
            ended_by = "uncertainty"
            break
        engine.push(policy.engine_weights())
        rollout = to_rollout(engine.sample(next(batches), draw_seed(seed, number + 1)))
        mask = rollout.tokens.response_mask
        # Every pass over the rollout is cut into the micro-batches of the update's first: in bfloat16 a row's
        # log-probabilities depend on its company, and pi_theta must begin as pi_old.
        passes = draw_minibatches(rollout.tokens, settings, draw_generator(seed, number))
        budget = settings.micro_batch_tokens
        judged = judge_rollout(policy, reward_model, rollout, temperature, budget, passes[0])
        # In float32 engine and trainer agree to less than any step of PPO notices: pi_old is mu, and a pass over some
        # answers is enough to see that the push landed.
        exact = policy.model.dtype == torch.float32
        rows = torch.arange(PUSH_ANSWERS if exact else len(mask))[: len(mask)]
        groups = [rows] if exact else passes[0]
        seen = policy_logprobs(policy, rollout.tokens, temperature, budget, groups)
        gap = mismatch(seen[rows], rollout.behavior_logprobs[rows], mask[rows])
        check_push(gap, settings.mismatch_limit, policy.model.dtype)
        if number == 0 and settings.start_from == "reference":
            check_start(seen[rows], judged.ref_logprobs[rows])
        old_logprobs = rollout.behavior_logprobs if exact else seen
        kl = float(kl_k1(old_logprobs, judged.ref_logprobs).sum(dim=1).mean())
        if kl > settings.kl_budget:
            # The weights that were just sampled from are over the budget: no candidate.
            drop_candidates(directory, after=number - 1)
            ended_by = "kl_budget"
            break

        kl_coef = next_kl_coef(figures, settings)
        raw = reward_model.scores(judged.features)
        scores = replace_cut(reward_model.clipped(raw), rollout, settings.missing_eos_score)
        batch = to_experience(rollout, judged, old_logprobs, scores, critic, kl_coef, settings)
        stats = ppo_update(logprobs_of, critic, optimizer, batch, settings, passes)
        if stats.first_ratio_error > 0.05:
            raise RuntimeError(
                f"pi_theta differed from pi_old by {stats.first_ratio_error:.3f} nats a token before its first update."
            )
        figures.append(
            StepFigures(
                step=number,
                # Of what the reward model said: a score that replaced it would say nothing of the answers.
                score=float(raw.mean()),
                score_sd=float(raw.std()),
                uncertainty=float(reward_model.member_scores(judged.features).mean(dim=1).std()),
                clipped_share=float((raw != reward_model.clipped(raw)).float().mean()),
                kl=kl,
                kl_coef=kl_coef,
                # Of the sampled tokens: an estimate without bias that needs no other word's probability.
                entropy=float(masked_mean(-old_logprobs, mask)),
                length=float(mask.sum(dim=1).float().mean()),
                ended=float(rollout.ended.float().mean()),
                explained_variance=explained_variance(batch.values, batch.returns, mask),
                **{f"mismatch_{name}": value for name, value in asdict(gap).items()},
                **asdict(stats),
            )
        )
        if (number + 1) % settings.save_every == 0 or number + 1 == settings.steps:
            policy.save(candidate(directory, number + 1))
        if (number + 1) % settings.checkpoint_every == 0:
            save_state(directory, [asdict(step) for step in figures], optimizer)
        on_step(figures[-1])
    return Training(figures, candidates(directory), ended_by)


def candidate(directory: Path, step: int) -> Path:
    """Where the weights after `step` updates are."""
    return directory / f"step-{step:03d}"


def candidates(directory: Path) -> list[int]:
    """The steps whose weights were kept."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


def drop_candidates(directory: Path, after: int) -> None:
    """Removes the candidates of later steps than `after`."""
    for step in candidates(directory):
        if step > after:
            shutil.rmtree(candidate(directory, step))


def prompt_batches(prompts: list[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless batches, every prompt once before any is repeated."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Prompt] = []
    while True:
        while len(waiting) < size:
            waiting += [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]


def next_kl_coef(figures: list[StepFigures], settings: PPOSettings) -> float:
    """The penalty's weight after the steps so far."""
    if not figures:
        return settings.kl_coef
    last = figures[-1]
    return adapt_kl_coef(last.kl_coef, last.kl, settings.kl_target, settings.kl_horizon, settings.episodes)


def outgrown(figures: list[StepFigures], patience: int) -> bool:
    """Whether score minus uncertainty had its best more than `patience` steps ago: since then the members of the reward
    model came to differ by more than the score gained."""
    sure = [step.score - step.uncertainty for step in figures]
    return len(sure) - sure.index(max(sure)) > patience + 1 if sure else False


def replace_cut(scores: Tensor, rollout: Rollout, missing_eos_score: float | None) -> Tensor:
    """Scores (B,) with those of answers that the length limit cut replaced, where a replacement is set."""
    return scores if missing_eos_score is None else torch.where(rollout.ended, scores, missing_eos_score)


def check_push(gap: Mismatch, limit: float | None, dtype: torch.dtype) -> None:
    """Raises where the engine cannot have sampled from the trainer's weights: a push that did not land trains silently
    on old ones. Without a `limit`, what rounding in `dtype` can explain."""
    limit = limit or MISMATCH_LIMITS[dtype]
    if gap.rms > limit:
        raise RuntimeError(
            f"The engine does not sample from the weights that were pushed: its log-probabilities differ from the "
            f"trainer's by {gap.rms:.3f} (root mean square), more than {limit}."
        )


def check_start(old_logprobs: Tensor, ref_logprobs: Tensor) -> None:
    """Raises unless the policy that starts from the reference is the reference."""
    difference = float((old_logprobs - ref_logprobs).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"The policy differs from its reference by {difference:.4f} nats before its first update.")


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns] over the valid tokens: 0 says the critic knows nothing."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    return float(1 - variance(returns - values) / variance(returns).clamp(min=1e-8))
