"""The learner's settings.

Names shared with the server (`data_dir`, `service_temperature`, ...) are the server's too; the rest stands in tables:
`[policy]`, `[reward]`, `[ppo]`, `[gate]`, in variables `PREFLOOP_PPO__STEPS=12`.
"""

from datetime import time
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from server.shared.model.dtype import MICRO_BATCH_TOKENS, DtypeName, DtypeSetting
from server.shared.settings_base import SettingsBase
from server.shared.stored_round import ANSWER_TOKENS

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class RewardSettings(BaseModel):
    """How votes become a score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] = Field(
        (), description="Hidden states to pool; empty: five, evenly spaced, the last among them."
    )
    l2_grid: tuple[Positive, ...] = Field((0.3, 1.0, 3.0, 10.0, 30.0), description="Penalties to choose from.")
    label_smoothing: Share = Field(0.05, description="The share of votes taken to say the opposite of what was meant.")
    folds: int = Field(5, ge=2, description="Folds of the cross-validation, by conversation.")
    fold_repeats: int = Field(
        4, ge=1, description="How often the penalty's choice is cross-validated anew and averaged."
    )
    signal_votes: int = Field(
        1_000, ge=20, description="Votes of the signal test at most, drawn by conversation: enough for any signal."
    )
    signal_l2: Positive = Field(1.0, description="The signal test's penalty, fixed.")
    signal_folds: int = Field(10, ge=2, description="The signal test's folds.")
    signal_repeats: int = Field(2, ge=1, description="How often the signal test makes folds anew; it averages.")
    permutations: int = Field(199, ge=20, description="Shuffles of the signal test; its smallest p is 1 / (1 + this).")
    half_life_days: Positive = Field(90.0, description="A vote this old counts half.")
    age_floor: Share = Field(0.1, description="No vote counts less than this for its age.")
    user_share: Share = Field(
        0.05, description="No user has more of the total weight, or than two equal shares; few users are not capped."
    )
    weigh_voters: bool = Field(
        True, description="Voters who answer against the others, or always name one slot, count less or not at all."
    )
    members: int = Field(
        32, ge=2, description="Heads refitted on redrawn conversations; where they differ, the score is uncertain."
    )
    reference_answers: int = Field(64, ge=8, description="Answers of the reference that scores are standardised on.")


class PolicySettings(BaseModel):
    """The policy in training, whatever improves it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Literal["lora", "full"] = Field("lora", description="Train adapters on the reference, or all weights.")
    start_from: Literal["reference", "active"] = Field(
        "reference", description="Where a round begins; from the reference no drift is carried from round to round."
    )
    lora_rank: int = Field(16, ge=1, description="Rank of the adapters, on every linear layer.")
    lora_alpha: int = Field(32, ge=1, description="Adapters are scaled by this over their rank.")
    micro_batch_tokens: int = Field(
        0,
        ge=0,
        description="Tokens in one forward pass, padding counted; changes speed and memory alone. "
        "0: 2048 in bfloat16, 1024 in float32.",
    )
    mismatch_limit: Positive | None = Field(
        None,
        description="Root mean square of log pi_old / mu above which the engine is taken to hold other weights. "
        "Default: 0.35 in bfloat16, 0.005 in float32.",
    )
    kl_budget: Positive = Field(6.0, description="Sequence KL in nats at which the round stops training.")

    def at(self, dtype: DtypeName) -> "PolicySettings":
        """With what follows from the dtype filled in."""
        tokens = self.micro_batch_tokens or MICRO_BATCH_TOKENS[dtype]
        return self.model_copy(update={"micro_batch_tokens": tokens})


class PPOSettings(BaseModel):
    """Proximal policy optimisation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(12, ge=1, le=900, description="Rollout batches at most.")
    episodes: int = Field(32, ge=2, description="Responses in a rollout batch.")
    epochs: int = Field(1, ge=1, description="Passes over each rollout batch.")
    minibatches: int = Field(2, ge=1, description="Optimiser steps in each pass.")
    learning_rate: Positive = Field(2e-4, description="Adam's, for the policy.")
    critic_learning_rate: Positive = Field(1e-3, description="Adam's, for the value head.")
    adam_epsilon: Positive = Field(1e-5, description="Adam's epsilon.")
    max_grad_norm: Positive = Field(1.0, description="Gradients are scaled down to this norm.")
    gamma: Share = Field(1.0, description="Discount per token.")
    gae_lambda: Share = Field(0.95, description="Bias against variance in the advantages.")
    clip_range: Positive = Field(0.2, description="The ratio's clip.")
    dual_clip: float = Field(3.0, gt=1, description="Bound on the loss of bad tokens that became likelier.")
    value_clip: Positive = Field(0.2, description="The values' clip.")
    vf_coef: Positive = Field(0.1, description="Weight of the value loss.")
    kl_coef: float = Field(0.1, ge=0, description="The KL penalty's first weight.")
    kl_target: Positive = Field(3.5, description="Sequence KL in nats that the penalty is steered to.")
    kl_horizon: Positive = Field(160.0, description="Episodes over which the penalty is steered.")
    approx_kl_stop: Positive = Field(0.02, description="KL a token from the rollout's policy at which an update stops.")
    importance_cap: Positive = Field(2.0, description="Cap of the trainer / engine importance weights.")
    missing_eos_score: float | None = Field(
        None, description="Replaces the score of an answer without EOS; off by default."
    )
    patience: int = Field(
        4,
        ge=1,
        description="Steps without a new best of score minus its uncertainty after which the round stops training.",
    )
    save_every: int = Field(1, ge=1, description="Steps between candidates.")
    checkpoint_every: int = Field(1, ge=1, description="Steps between states that a killed round goes on from.")

    @model_validator(mode="after")
    def _whole_minibatches(self) -> "PPOSettings":
        if self.minibatches > self.episodes:
            raise ValueError("minibatches cannot be more than episodes")
        return self


class GateSettings(BaseModel):
    """What a candidate must show."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    judge_share: float = Field(0.4, gt=0, lt=1, description="Share of conversations whose votes judge and never train.")
    refits: int = Field(500, ge=100, description="Bootstrap refits of the judge.")
    prompts: int = Field(64, ge=8, description="Held-out prompts at most.")
    answers: int = Field(2, ge=1, description="Answers to each held-out prompt; each meets each of the opponent's.")
    candidates: int = Field(
        4, ge=1, description="Candidates at most: the last, the one before, and twice as far back each time."
    )
    candidate_spacing: Share = Field(
        0.2, description="A candidate whose KL is nearer than this share to that of a later one is not judged."
    )
    keep_candidates: bool = Field(False, description="Keep every candidate's weights in the round's directory.")
    signal_p: Share = Field(
        0.02,
        description="The signal test's level: of rounds on votes that say nothing, at most this share can promote.",
    )
    confidence: float = Field(
        0.9, gt=0.5, lt=1, description="Of the win rate's two-sided interval; at 0.9 its lower end is a 95 % bound."
    )
    early_share: Share = Field(
        0.2,
        description="Share of the interval's error that is spent on a first look at half of the prompts, where a clear "
        "case ends the gate; 0: one look.",
    )
    gap_margin: Share = Field(
        0.05,
        description="How far the judge's win rate may fall below an earlier candidate's while the trained one rises.",
    )
    length_range: tuple[float, float] = Field((0.25, 2.0), description="Mean length, in the incumbent's.")
    empty_margin: Share = Field(0.05, description="How much more often than the incumbent's an answer may be empty.")
    repetition_margin: Share = Field(0.15, description="How much more than the incumbent it may repeat its 4-grams.")


class ScheduleSettings(BaseModel):
    """When `learner schedule` starts a round by itself. Times are local. Requests are not held up by any of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str = Field("0 3 * * *", description="Five cron fields, as Debian's cron reads them, or @daily and the like.")
    interval_minutes: float | None = Field(
        None, gt=0, description="A round every this many minutes; where it is set, `cron` is not looked at."
    )
    on_request: bool = Field(False, description="No clock: rounds start only when RequestRound asks for one.")
    min_new_votes: int = Field(1, ge=0, description="Fewer votes since the last round start none.")
    quiet_hours: str = Field("", description="As `07:00-23:00`: no round starts in them, one that is due waits.")
    retry_minutes: Positive = Field(
        5.0, description="A failed round is tried again after this long, after twice as long the next time, and so on."
    )
    retries: int = Field(4, ge=0, description="How often a failed round is tried again before its next regular time.")

    @field_validator("quiet_hours")
    @classmethod
    def _hours(cls, hours: str) -> str:
        if hours:
            quiet_hours(hours)
        return hours


def quiet_hours(hours: str) -> tuple[time, time]:
    """Start and end of hours such as 22:00-07:00. Raises ValueError for what are none."""
    try:
        start, end = (time.fromisoformat(part.strip()) for part in hours.split("-"))
    except ValueError as error:
        raise ValueError(f"{hours!r} are no hours; 22:00-07:00 are") from error
    return start, end


def quiet(hours: str, now: time) -> bool:
    """Whether `now` is in the hours; never, where there are none."""
    if not hours:
        return False
    start, end = quiet_hours(hours)
    return start <= now < end if start <= end else now >= start or now < end


class LearnerSettings(SettingsBase):
    """What every command of the learner is told."""

    renamed: ClassVar = {
        "gpu_memory_share": "learner_gpu_memory_share",
        "duel_user_votes": "ab_test_user_votes",
        "ppo.dtype": "dtype",
        "ppo.micro_batch": "policy.micro_batch_tokens",
        **{f"ppo.{name}": f"policy.{name}" for name in PolicySettings.model_fields},
    }
    rescaled: ClassVar = {"ppo.micro_batch": ANSWER_TOKENS}

    data_dir: Path = Field(Path("data"), description="Everything that is kept: the database and the policies.")
    service_temperature: float = Field(
        0.85, gt=0, le=2, description="Chat's default temperature: rollouts and gate use it."
    )
    dtype: DtypeSetting = Field(
        "auto", description="Arithmetic of engines and trainer; `auto`: bfloat16 where the hardware computes in it."
    )
    max_model_len: int = Field(
        2048, ge=64, description="Tokens of a prompt and its answer together; longer prompts are left out."
    )
    kv_cache_gib: int = Field(1, ge=1, description="Memory for the KV cache on a CPU.")
    learner_gpu_memory_share: float = Field(
        0.3, gt=0, le=1, description="Share of the GPU's memory for the learner's engine."
    )
    cpu_threads: str = Field(
        "auto",
        description="Cores that the engine's threads are bound to on a CPU, as `0-3,6`; `auto`: none, but all used.",
    )
    ab_test_user_votes: int = Field(10, ge=1, description="Votes of one user that count between two versions.")
    min_votes: int = Field(40, ge=1, description="Fewer votes start no round.")
    max_votes: int = Field(20_000, ge=100, description="A round learns from the newest votes, this many at most.")
    skip_rolled_back: bool = Field(
        False, description="Leave out votes on answers of versions that were rolled back, until they serve again."
    )
    max_prompts: int = Field(
        20_000,
        ge=100,
        description="Prompts are those of this many responses at most: everybody's newest, then everybody's second.",
    )
    min_prompts: int = Field(
        24, ge=8, description="Prompts to train on, and to hold out, that users' are topped up to by the project's own."
    )
    seed: int = Field(0, ge=0, description="Of every random draw.")
    max_resumes: int = Field(5, ge=0, description="A round that was killed more often than this is given up as failed.")
    keep_versions: int = Field(
        8,
        ge=1,
        description="Versions whose weights are kept beside the reference, the active one and the one before it.",
    )
    nice: int = Field(0, ge=0, le=19, description="How far a round steps back behind other processes.")
    threads: int = Field(0, ge=0, description="Threads of a round's own computing; 0: one for each core.")
    lease_seconds: Positive = Field(30.0, description="How long a killed learner keeps others out.")
    load_timeout_seconds: Positive = Field(
        120.0, description="How long to wait for a live server to load a new version."
    )
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, description="When rounds start by themselves.")
    reward: RewardSettings = Field(default_factory=RewardSettings, description="How votes become a score.")
    policy: PolicySettings = Field(default_factory=PolicySettings, description="The policy in training.")
    ppo: PPOSettings = Field(default_factory=PPOSettings, description="How the policy is improved.")
    gate: GateSettings = Field(default_factory=GateSettings, description="What a candidate must show.")

    @model_validator(mode="after")
    def _reachable(self) -> "LearnerSettings":
        if self.gate.signal_p * (1 + self.reward.permutations) <= 1:
            raise ValueError(
                f"gate.signal_p {self.gate.signal_p:g} cannot be undercut with {self.reward.permutations} permutations"
            )
        return self
