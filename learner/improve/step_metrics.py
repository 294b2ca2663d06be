"""The metrics of a step, which are the same for every improver as far as it has them."""

import math
from dataclasses import asdict

from learner.improve.training import SampledBatch
from learner.model.kl import masked_mean
from learner.reward.base import RewardModel
from server.store.learning.round_metrics import StepMetrics


def step_metrics(
    batch: SampledBatch,
    reward_model: RewardModel,
    *,
    step: int,
    kl_coef: float,
    policy_loss: float,
    grad_norm: float,
    optimizer_steps: int,
    value_loss: float = math.nan,
    explained_variance: float = math.nan,
    approx_kl: float = math.nan,
    clipfrac: float = math.nan,
    first_ratio_error: float = math.nan,
) -> StepMetrics:
    """Those of the batch, whose scores are neither replaced nor clipped, and those of its update."""
    mask, raw = batch.rollout.tokens.response_mask, reward_model.scores(batch.judged.features)
    return StepMetrics(
        step=step,
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
        explained_variance=explained_variance,
        policy_loss=policy_loss,
        value_loss=value_loss,
        approx_kl=approx_kl,
        clipfrac=clipfrac,
        grad_norm=grad_norm,
        optimizer_steps=optimizer_steps,
        first_ratio_error=first_ratio_error,
        **{f"mismatch_{name}": value for name, value in asdict(batch.gap).items()},
    )
