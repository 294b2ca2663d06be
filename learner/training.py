"""The PPO loop: push, sample, score, advantages, update; candidates along the way.

Three policies meet in a step: mu, the engine that sampled; pi_old, the trainer before its update; pi_theta, while it
steps. The reference's pass gives the log-probabilities for the KL and, from the same hidden states, the features that
the reward model scores and the critic values. Every step proves that the weights pushed are the weights sampled from.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from learner.advantages import adapt_kl_coef, gae, kl_k1, masked_mean, shape_rewards, whiten
from learner.features import pool, pool_prefixes
from learner.forward import Tokens, micro_batches, response_states, run_trunk, token_logprobs
from learner.policy import Policy
from learner.ppo import Adam, Critic, Experience, Mismatch, mismatch, ppo_update
from learner.reward_model import RewardModel
from learner.rollout import Engine, Rollout, to_rollout
from learner.settings import PPOSettings
from server.records import Prompt

# Tokens of prior belief that a prefix is average: a mean over few tokens says little.
PREFIX_PRIOR = 8.0


@dataclass(frozen=True)
class Judged:
    """A rollout seen by the reference: ref_logprobs (B, T), pooled features (B, F), prefix features (B, T, F)."""

    ref_logprobs: Tensor
    features: Tensor
    prefix_features: Tensor


@dataclass(frozen=True)
class StepFigures:
    """One step, as it is logged. KL in nats a response, lengths in tokens."""

    step: int
    score: float
    score_sd: float
    clipped_share: float
    kl: float
    kl_coef: float
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
class Candidate:
    """Weights saved after `step` updates; the KL is of the rollout that the step began with."""

    step: int
    directory: Path


@torch.no_grad()
def judge_rollout(policy: Policy, reward_model: RewardModel, rollout: Rollout, temperature: float, size: int) -> Judged:
    """The reference's pass over a rollout."""
    tokens = rollout.tokens
    ref_logprobs = torch.zeros(tokens.response_mask.shape)
    features = torch.zeros(len(tokens), len(reward_model.weights))
    prefix_features = torch.zeros(*tokens.response_mask.shape, len(reward_model.weights))
    with policy.reference() as reference:
        for rows in micro_batches(tokens, size):
            part = tokens[rows]
            hidden, layer_states = run_trunk(reference, part, reward_model.layers)
            width = part.response_mask.shape[1]
            ref_logprobs[rows, :width] = token_logprobs(reference, hidden, part, temperature)
            states = response_states(layer_states, part)
            features[rows] = pool(states, part.response_mask)
            prefix_features[rows, :width] = critic_features(states, reward_model)
    return Judged(ref_logprobs, features, prefix_features)


def critic_features(states: Tensor, reward_model: RewardModel) -> Tensor:
    """(B, T, F) standardised features of the tokens before each position, shrunk to the average (zero) while they are
    few. Their length is no prediction of the answer's, so that feature starts from the mean, too."""
    prefix, counts = pool_prefixes(states)
    mean, scale = reward_model.standardiser.mean[:-1], reward_model.standardiser.scale[:-1]
    standard = (prefix - mean) * scale * (counts / (counts + PREFIX_PRIOR))[None, :, None]
    position = (counts / counts.shape[0] - 0.5).expand(len(states), -1).unsqueeze(-1)
    return torch.cat([standard, position], dim=2)


def make_critic(reward_model: RewardModel) -> Critic:
    """The reward head on the prefix's features; it knows nothing of position yet."""
    weights = reward_model.weights.clone()
    weights[-1] = 0.0
    return Critic(weights)


@torch.no_grad()
def policy_logprobs(policy: Policy, tokens: Tokens, temperature: float, size: int) -> Tensor:
    """(B, T) log-probabilities of the sampled tokens under the policy as it is."""
    logprobs = torch.zeros(tokens.response_mask.shape)
    for rows in micro_batches(tokens, size):
        part = tokens[rows]
        hidden, _ = run_trunk(policy.model, part)
        logprobs[rows, : part.response_mask.shape[1]] = token_logprobs(policy.model, hidden, part, temperature)
    return logprobs


def prompt_batches(prompts: list[Prompt], size: int, generator: torch.Generator) -> Iterator[list[Prompt]]:
    """Endless batches, every prompt once before any is repeated."""
    waiting: list[Prompt] = []
    while True:
        while len(waiting) < size:
            waiting += [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]


def train(
    policy: Policy,
    reward_model: RewardModel,
    engine: Engine,
    prompts: list[Prompt],
    directory: Path,
    settings: PPOSettings,
    temperature: float,
    seed: int,
    on_step: Callable[[StepFigures], None],
) -> list[Candidate]:
    """PPO until `steps` are done or the sequence KL exceeds its budget; the candidates saved in `directory`."""
    generator = torch.Generator().manual_seed(seed)
    critic = make_critic(reward_model)
    optimizer = Adam(
        [(policy.parameters, settings.learning_rate), (list(critic.parameters()), settings.critic_learning_rate)],
        settings.adam_epsilon,
    )
    batches = prompt_batches(prompts, settings.episodes, generator)
    kl_coef = settings.kl_coef
    candidates: list[Candidate] = []
    for step in range(settings.steps):
        engine.push(policy.engine_weights())
        rollout = to_rollout(engine.sample(next(batches), seed + step + 1))
        tokens, mask = rollout.tokens, rollout.tokens.response_mask
        judged = judge_rollout(policy, reward_model, rollout, temperature, settings.micro_batch)
        old_logprobs = policy_logprobs(policy, tokens, temperature, settings.micro_batch)

        gap = mismatch(old_logprobs, rollout.behavior_logprobs, mask)
        kl = float(kl_k1(old_logprobs, judged.ref_logprobs).sum(dim=1).mean())
        check_push(gap, settings.mismatch_limit)
        if step == 0 and settings.start_from == "reference":
            check_start(old_logprobs, judged.ref_logprobs)
        if kl > settings.kl_budget:
            # The weights that were just sampled from are over the budget: no candidate.
            del candidates[-1:]
            break

        raw = reward_model.scores(judged.features)
        scores = reward_model.clipped(raw)
        if settings.missing_eos_score is not None:
            scores = torch.where(rollout.ended, scores, settings.missing_eos_score)
        with torch.no_grad():
            values = critic(judged.prefix_features)
        rewards = shape_rewards(scores, old_logprobs, judged.ref_logprobs, mask, kl_coef)
        advantages, returns = gae(rewards, values, mask, settings.gamma, settings.gae_lambda)
        batch = Experience(
            tokens,
            old_logprobs,
            rollout.behavior_logprobs,
            judged.prefix_features,
            values,
            whiten(advantages, mask),
            returns,
        )

        def logprobs_of(part: Tokens) -> Tensor:
            hidden, _ = run_trunk(policy.model, part)
            return token_logprobs(policy.model, hidden, part, temperature)

        stats = ppo_update(logprobs_of, critic, optimizer, batch, settings, generator)
        if stats.first_ratio_error > 0.05:
            raise RuntimeError(
                f"pi_theta differed from pi_old by {stats.first_ratio_error:.3f} nats a token before its first update."
            )
        on_step(
            StepFigures(
                step=step,
                score=float(raw.mean()),
                score_sd=float(raw.std()),
                clipped_share=float((raw != reward_model.clipped(raw)).float().mean()),
                kl=kl,
                kl_coef=kl_coef,
                length=float(mask.sum(dim=1).float().mean()),
                ended=float(rollout.ended.float().mean()),
                explained_variance=explained_variance(values, returns, mask),
                **{f"mismatch_{name}": value for name, value in asdict(gap).items()},
                **asdict(stats),
            )
        )
        kl_coef = adapt_kl_coef(kl_coef, kl, settings.kl_target, settings.kl_horizon, settings.episodes)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            candidate = Candidate(step + 1, directory / f"step-{step + 1:03d}")
            policy.save(candidate.directory)
            candidates.append(candidate)
    return candidates


def check_push(gap: Mismatch, limit: float) -> None:
    """Raises where the engine cannot have sampled from the trainer's weights: a push that did not land trains silently
    on old ones."""
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
