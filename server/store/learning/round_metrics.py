"""What a round measured, stage by stage: written by the learner, read by reports, status, the board and
Prometheus. A figure that could not be taken is NaN here and null in JSON.

How a round's JSON of an earlier version is read is `server.shared.stored_round`'s. Lengths are in tokens, KL in nats.
"""

import math
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter, ValidationError

Figure = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: None if math.isnan(value) else value),
]
EndedBy = Literal["steps", "kl_budget", "uncertainty"]


@dataclass(frozen=True)
class VoteCounts:
    """The votes of the snapshot by kind, and by what they are for."""

    choices: int
    thumbs: int
    corrections: int
    train: int
    judge: int
    # On answers that cannot be read: without a token, or too long with their prompt.
    left_out: int
    # Of users in quarantine, which are not in the snapshot.
    quarantined: int

    @property
    def used(self) -> int:
        return self.choices + self.thumbs + self.corrections


@dataclass(frozen=True)
class PromptCounts:
    """Prompts to train on and held out, and how many of both are the project's own."""

    train: int
    held_out: int
    own: int


@dataclass(frozen=True)
class SignalTest:
    """Do the votes say anything that features can predict? Cross-validated accuracy, and of shuffled votes."""

    accuracy: Figure
    null_accuracy: Figure
    p_value: Figure


@dataclass(frozen=True)
class VoterWeights:
    """How many voters there were, how many count less than half, and the mean weight."""

    voters: int
    doubted: int
    mean_weight: Figure


@dataclass(frozen=True)
class HeldOut:
    """How well scores predict votes they were not fitted on, and what simpler rules and confounders make of them."""

    votes: int
    accuracy: Figure
    nll: Figure
    ece: Figure
    # The rules that a reward model has to beat: the longer answer, the one drawn at the higher temperature.
    longer_wins: Figure
    hotter_wins: Figure
    # Where length cannot help: the votes on answers of like length.
    matched_votes: int
    matched_accuracy: Figure
    # Correlation of the scores' difference with that of log length.
    length_correlation: Figure


@dataclass(frozen=True)
class RewardModelMetrics(HeldOut):
    """The reward model of the round, on judge votes; the last four in sd of reference answers, but for `l2`."""

    temperature_effect: Figure
    l2: Figure
    score_low: Figure
    score_high: Figure


@dataclass(frozen=True)
class StepMetrics:
    """One step of PPO. KL in nats a response, entropy in nats a token, lengths in tokens."""

    step: int
    score: Figure
    score_sd: Figure
    uncertainty: Figure
    clipped_share: Figure
    kl: Figure
    kl_coef: Figure
    entropy: Figure
    length: Figure
    ended: Figure
    explained_variance: Figure
    policy_loss: Figure
    value_loss: Figure
    approx_kl: Figure
    clipfrac: Figure
    grad_norm: Figure
    optimizer_steps: int
    first_ratio_error: Figure
    mismatch_rms: Figure
    mismatch_kl: Figure
    mismatch_effective_share: Figure
    mismatch_outside: Figure


@dataclass(frozen=True)
class Improvement:
    """How the policy was improved: the figures of every step, the steps whose weights were kept, and why it ended."""

    steps: list[StepMetrics]
    candidates: list[int]
    ended_by: EndedBy
    # What training steered the KL to, and where it stopped.
    kl_target: float | None = None
    kl_budget: float | None = None


@dataclass(frozen=True)
class WinRate:
    """Share of held-out prompts on which the candidate wins, with its interval."""

    rate: Figure
    low: Figure
    high: Figure
    prompts: int

    def __str__(self) -> str:
        return f"{self.rate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class AnswerHealth:
    """How answers look, whoever likes them: mean length, and shares that are empty, that ended, of repeated 4-grams."""

    length: Figure
    empty: Figure
    ended: Figure
    repetition: Figure


@dataclass(frozen=True)
class CandidateMetrics:
    """What was measured of one candidate on the held-out prompts."""

    step: int
    kl: Figure
    against_incumbent: WinRate
    against_reference: WinRate
    # The training reward model's own opinion against the incumbent: far above the judge's, it was over-optimised.
    trained_rate: Figure
    matched_rate: Figure
    matched_answers: int
    health: AnswerHealth

    @property
    def low(self) -> float:
        """The weaker of the two lower bounds."""
        return min(self.against_incumbent.low, self.against_reference.low)

    @property
    def hopeless(self) -> bool:
        """Whether it surely loses to one of the two."""
        return min(self.against_incumbent.high, self.against_reference.high) < 0.5


@dataclass(frozen=True)
class GateMetrics:
    """The candidate that was chosen, the rules that it broke, and all that were judged."""

    chosen: CandidateMetrics
    reasons: list[str]
    candidates: list[CandidateMetrics]
    incumbent_health: AnswerHealth


@dataclass(frozen=True)
class RoundMetrics:
    """What a round got to; None for a stage that it did not."""

    votes: VoteCounts | None = None
    prompts: PromptCounts | None = None
    signal: SignalTest | None = None
    voters: VoterWeights | None = None
    reward_model: RewardModelMetrics | None = None
    ppo: Improvement | None = None
    gate: GateMetrics | None = None
    # Of packages, by name.
    versions: dict[str, str] = field(default_factory=dict)
    # Of each stage, all attempts together.
    seconds: dict[str, float] = field(default_factory=dict)

    def __or__(self, more: "RoundMetrics") -> "RoundMetrics":
        """These, with what `more` has in their place."""
        return replace(self, **{name: value for name, value in vars(more).items() if value})

    def to_json(self) -> dict[str, Any]:
        """What there is, by name, ready for `json.dumps`."""
        dumped: dict[str, Any] = _adapter(RoundMetrics).dump_python(self, mode="json")
        return {name: value for name, value in dumped.items() if value}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RoundMetrics":
        """The way back. A stage that another version wrote, with other figures, is as if it had not been reached."""
        found = {}
        for each in fields(cls):
            try:
                found[each.name] = _adapter(cast(type, each.type)).validate_python(values[each.name])
            except (KeyError, ValidationError):
                continue
        return cls(**found)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
