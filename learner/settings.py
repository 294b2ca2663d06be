"""The learner's settings.

Settings whose names the server also has (`data_dir`, `service_temperature`, ...) are shared with it. Many others are in
tables: `[policy]`, `[reward]`, `[ppo]`, `[gate]`. A variable for one of these is `PREFLOOP_PPO__STEPS=12`.
"""

import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from learner.improve_settings import (
    DPOSettings,
    PolicySettings,
    PPOSettings,
    RLOOSettings,
    SFTSettings,
    TrainingSettings,
)
from learner.judge_settings import JudgeSettings
from learner.number_types import Positive, Share
from learner.schedule_settings import ScheduleSettings
from learner.worker_settings import WorkerSettings
from server.shared.model.dtype import DtypeSetting
from server.shared.stored_round import ANSWER_TOKENS, ONCE_OF_PPO
from server.store.settings import StoreSettings


class RewardSettings(BaseModel):
    """How votes become a score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] = Field(
        (),
        description="Hidden states that features are made of. Empty: early ones for words and late ones for meaning, "
        "and the votes choose between them.",
    )
    l2_grid: tuple[Positive, ...] = Field((0.3, 1.0, 3.0, 10.0, 30.0), description="L2 penalties to choose from.")
    label_smoothing: Share = Field(0.05, description="Share of votes assumed to say the opposite of what was meant.")
    folds: int = Field(5, ge=2, description="Folds of the cross-validation, by conversation.")
    fold_repeats: int = Field(
        4, ge=1, description="How many times the penalty's cross-validation is repeated and averaged."
    )
    signal_votes: int = Field(
        1_000, ge=20, description="Maximum votes in the signal test, drawn by conversation: enough for any signal."
    )
    signal_l2: Positive = Field(1.0, description="L2 penalty of the signal test, fixed.")
    signal_folds: int = Field(10, ge=2, description="Folds of the accuracy that is shown with the signal test.")
    signal_repeats: int = Field(2, ge=1, description="How many draws of folds this accuracy is averaged over.")
    signal_flips: int = Field(
        9_999, ge=20, description="Sign flips in the signal test; its smallest p is 1 / (1 + this)."
    )
    half_life_days: Positive = Field(90.0, description="A vote this old counts half.")
    age_floor: Share = Field(0.1, description="Smallest weight of a vote because of its age.")
    user_share: Share = Field(
        0.05, description="Maximum share of a user in the total weight of votes, or two equal shares if that is more."
    )
    weigh_voters: bool = Field(
        True, description="Give less or no weight to voters who vote against the others or always name one slot."
    )
    machine_share: Share = Field(
        0.5, description="Maximum share of a machine judge's choices in the total weight of the votes that train."
    )
    members: int = Field(
        32, ge=2, description="Heads refitted on redrawn conversations; if they differ, the score is uncertain."
    )
    imported: int = Field(
        1000, ge=0, description="Imported preferences that a round reads, at most: evenly spaced over all of them."
    )
    reference_answers: int = Field(64, ge=8, description="Number of reference answers that scores are standardised on.")


class GateSettings(BaseModel):
    """What a candidate must pass to be promoted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    judge_share: float = Field(0.4, gt=0, lt=1, description="Share of conversations whose votes judge and never train.")
    refits: int = Field(2000, ge=100, description="Bootstrap refits of the judge.")
    prompts: int = Field(32, ge=8, description="Maximum number of held-out prompts to choose a candidate on.")
    answers: int = Field(2, ge=1, description="Answers to each of them, all compared with all of the opponent's.")
    confirm_prompts: int = Field(
        256,
        ge=8,
        description="Maximum number of other prompts to confirm the chosen candidate on: the remaining held-out ones. "
        "If these are fewer than a batch, the operator's (review.prompt_files) and then shipped ones fill it up.",
    )
    confirm_batch: int = Field(
        64,
        ge=8,
        description="The gate looks after each batch of so many of them, and ends once the case is clear.",
    )
    candidates: int = Field(
        4, ge=1, description="Maximum number of candidates: the last, the one before, then each twice as far back."
    )
    candidate_spacing: Share = Field(
        0.2, description="A candidate whose KL is within this share of a later candidate's is not judged."
    )
    keep_candidates: bool = Field(False, description="Keep every candidate's weights in the round's directory.")
    signal_p: Share = Field(
        0.02,
        description="Error of all signal tests up to the first that passes: at most this share of services with "
        "meaningless votes ever train on them.",
    )
    confidence: float = Field(
        0.98,
        gt=0.5,
        lt=1,
        description="Level of the win rate's two-sided interval over all looks together; at 0.98 its lower end is a "
        "99 % bound.",
    )
    canary: Literal["auto", "on", "always", "off"] = Field(
        "auto",
        description="Let a candidate that the judge finds neither better for certain nor worse for certain wait as a "
        "canary until people's choices in reviews decide; `auto`: where enough people vote. Otherwise it is refused. "
        "`always`: every candidate that the gate would promote waits, too.",
    )
    best_margin: Share = Field(
        0.05,
        description="How far below a half the lower bound of the win rate against the best version so far may be.",
    )
    canary_recent_votes: int = Field(
        20, ge=0, description="Votes in the last seven days from which `auto` lets a candidate wait as a canary."
    )
    canary_evidence: float = Field(
        20.0, gt=1, description="A canary that is no better is promoted about once in this many times."
    )
    canary_votes: int = Field(
        200, ge=1, description="A canary waits for at most this many choices that count; all together then decide."
    )
    canary_days: Positive = Field(
        7.0, description="A canary waits for at most this many days; all choices then decide."
    )
    canary_voters: int = Field(
        20,
        ge=1,
        description="From this many voters of the last 30 days on, the mean of each one's first canary_user_votes "
        "choices counts. Of fewer, each of the first ab_test_user_votes choices, and of a single voter all.",
    )
    canary_user_votes: int = Field(3, ge=1, description="Choices of a user that count together.")
    length_range: tuple[float, float] = Field(
        (0.25, 2.0), description="Allowed mean length relative to the incumbent's."
    )
    empty_margin: Share = Field(0.05, description="Allowed excess of empty answers over the incumbent's.")
    repetition_margin: Share = Field(0.15, description="Allowed excess of repeated 4-grams over the incumbent's.")


class CheckSettings(BaseModel):
    """What an operator wants of every version, beside what people prefer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Path | None = Field(
        None,
        description="JSON lines with `prompt`, and `must` and `must_not`, lists of regular expressions for the answer: "
        "a candidate that breaks one is not promoted.",
    )
    command: str = Field(
        "",
        description="Reads the answers to these prompts as JSON lines, and prints a number last; a candidate with too "
        "low a score is not promoted.",
    )
    min_score: float | None = Field(None, description="The lowest score to be promoted; default: the incumbent's.")
    timeout_seconds: Positive = Field(300.0, description="How long the command may take.")

    @model_validator(mode="after")
    def _has_prompts(self) -> "CheckSettings":
        if self.command and not self.file:
            raise ValueError("checks.command needs the prompts of checks.file")
        return self


class ReviewSettings(BaseModel):
    """The pairs of answers that a round offers people for review."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: int = Field(96, ge=8, description="Pairs to everybody's prompts, and at most as many to users' own.")
    own_pairs: int = Field(5, ge=0, description="Pairs to each user's own newest prompts, which only this user sees.")
    active_pairs: int = Field(
        16,
        ge=0,
        description="Pairs of the served version's answers that would teach the reward model most, to everybody's "
        "prompts, and at most as many to users' own; 0 for none.",
    )
    active_answers: int = Field(16, ge=2, description="Answers to a prompt, of which such a pair is chosen.")
    prompt_files: tuple[Path, ...] = Field(
        (), description="Files of prompts, one per line, to use beside the shipped ones."
    )
    share_prompts: bool = Field(
        False, description="Show users' prompts to other users, too: only where people here may see each other's."
    )


class LearnerSettings(StoreSettings):
    """The settings of every learner command."""

    renamed: ClassVar = {
        "gpu_memory_share": "learner_gpu_memory_share",
        "duel_user_votes": "ab_test_user_votes",
        "reward.permutations": "reward.signal_flips",
        "gate.canary_margin": "gate.best_margin",
        "ppo.dtype": "dtype",
        "ppo.micro_batch": "policy.micro_batch_tokens",
        **{f"ppo.{name}": f"policy.{name}" for name in ONCE_OF_PPO},
    }
    rescaled: ClassVar = {"ppo.micro_batch": ANSWER_TOKENS}
    dropped: ClassVar = {
        "gate.early_share": "the gate looks after each gate.confirm_batch prompts",
        "gate.gap_margin": "a candidate is left out if an earlier one is better for certain",
    }

    data_dir: Path = Field(Path("data"), description="Directory of the database and the policies.")
    trust_remote_code: bool = Field(
        False, description="Run the Python code in the model's directory, if transformers does not know the model."
    )
    system_prompt: str = Field(
        "", description="What every conversation begins with; so do prompts of nobody's, and demonstrations."
    )
    service_temperature: float = Field(
        0.85, gt=0, le=2, description="Chat's default temperature, also used by rollouts and the gate."
    )
    dtype: DtypeSetting = Field(
        "auto", description="Data type of engines and trainer; `auto`: bfloat16 if the hardware computes in it."
    )
    max_model_len: int = Field(
        2048, ge=64, description="Maximum tokens of a prompt and its answer together; longer prompts are left out."
    )
    kv_cache_gib: int = Field(1, ge=1, description="Memory for the KV cache on a CPU.")
    learner_device: str = Field(
        "auto",
        description="Where models are trained and votes are read: `cpu`, `cuda`, or `cuda:1` for one of several GPUs, "
        "then also for the learner's engine; `auto`: the GPU if the engine uses it.",
    )
    learner_gpu_memory_share: float = Field(
        0.3, gt=0, le=1, description="Share of the GPU's memory for the learner's engine."
    )
    server_gpu_memory_share: float = Field(
        0.5, gt=0, le=1, description="Share of the GPU's memory for the server's engine."
    )
    cpu_threads: str = Field(
        "auto",
        description="Cores that the engine's threads are bound to on a CPU, as `0-3,6`; `auto`: all cores, unbound.",
    )
    ab_test_voters: int = Field(
        10,
        ge=1,
        description="From this many voters on, one vote per user counts in an A/B test; several of each of fewer, "
        "and all of a single voter.",
    )
    ab_test_user_votes: int = Field(
        10, ge=1, description="Votes per user that count in an A/B test if there are fewer voters than that."
    )
    min_votes: int = Field(40, ge=1, description="Minimum number of votes for a round.")
    max_votes: int = Field(20_000, ge=100, description="A round learns from the newest votes, at most this many.")
    skip_rolled_back: bool = Field(
        False, description="Leave out votes on answers of versions that were rolled back, until they serve again."
    )
    max_prompts: int = Field(
        20_000,
        ge=100,
        description="Prompts are taken from at most this many responses: each user's newest, then second newest, ...",
    )
    min_prompts: int = Field(
        24, ge=8, description="Minimum prompts to train on, and to hold out; built-in prompts make up for missing ones."
    )
    seed: int = Field(0, ge=0, description="Seed of every random draw.")
    max_resumes: int = Field(5, ge=0, description="A round that was killed more often than this is marked as failed.")
    keep_versions: int = Field(
        8,
        ge=1,
        description="Versions to keep weights of, besides the active version, the one before it, of each model what "
        "was made from it and the one that was served last, and the references of these.",
    )
    nice: int = Field(0, ge=0, le=19, description="Niceness of a round's process.")
    threads: int = Field(0, ge=0, description="Threads of a round's own computation; 0: one per core.")
    lease_seconds: Positive = Field(30.0, description="How long a killed learner blocks others.")
    load_timeout_seconds: Positive = Field(
        120.0, description="How long to wait for running servers to load a new version."
    )
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, description="When rounds start by themselves.")
    reward: RewardSettings = Field(default_factory=RewardSettings, description="How votes become a score.")
    policy: PolicySettings = Field(default_factory=PolicySettings, description="The policy in training.")
    improver: Literal["ppo", "rloo", "dpo"] = Field("ppo", description="How the policy is improved.")
    ppo: PPOSettings = Field(default_factory=PPOSettings, description="Proximal policy optimisation.")
    rloo: RLOOSettings = Field(default_factory=RLOOSettings, description="REINFORCE, leave-one-out.")
    dpo: DPOSettings = Field(default_factory=DPOSettings, description="Direct preference optimisation.")
    sft: SFTSettings = Field(default_factory=SFTSettings, description="Learning from demonstrations and corrections.")
    review: ReviewSettings = Field(default_factory=ReviewSettings, description="What people are asked to compare.")
    judge: JudgeSettings = Field(
        default_factory=JudgeSettings, description="A model that chooses between stored answers."
    )
    checks: CheckSettings = Field(default_factory=CheckSettings, description="What every version must do.")
    workers: WorkerSettings = Field(default_factory=WorkerSettings, description="Training by several processes.")
    gate: GateSettings = Field(default_factory=GateSettings, description="What a candidate must pass to be promoted.")

    @property
    def training(self) -> TrainingSettings:
        """The settings of the improver that is set."""
        settings: TrainingSettings = getattr(self, self.improver)
        return settings

    @field_validator("learner_device")
    @classmethod
    def _device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("must be auto, cpu, cuda, or cuda and a number such as cuda:1")
        return device

    @model_validator(mode="after")
    def _reachable(self) -> "LearnerSettings":
        if self.gate.signal_p / 2 * (1 + self.reward.signal_flips) < 1:
            raise ValueError(
                f"gate.signal_p {self.gate.signal_p:g} is too small for {self.reward.signal_flips} reward.signal_flips"
            )
        return self
