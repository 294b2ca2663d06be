"""Metrics of a round by stage: written by the learner, read by reports, status, the board and Prometheus.

A metric that could not be measured is NaN here and null in JSON. `server.shared.stored_round` reads the JSON of earlier
versions. Lengths are in tokens, KL in nats.
"""

import math
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

from server.store.learning.fine_tuned import Figure, FineTuned

# An estimate of more than this times the votes says only that they are weak.
MOST_TIMES = 10
EndedBy = Literal["steps", "kl_budget", "uncertainty"]


@dataclass(frozen=True)
class VoteCounts:
    """The votes of the snapshot, by kind and by purpose; of the corrections those that train."""

    choices: int
    thumbs: int
    corrections: int
    train: int
    judge: int
    # On unreadable answers: without a token, or too long with their prompt.
    left_out: int
    # Votes of users in quarantine, which are not in the snapshot.
    quarantined: int
    # Choices of a machine judge, which are among those that train.
    machine: int = 0

    @property
    def used(self) -> int:
        return self.choices + self.thumbs + self.corrections


@dataclass(frozen=True)
class PromptCounts:
    """Prompts to train on, prompts held out, and how many of both are the project's own."""

    train: int
    held_out: int
    own: int


@dataclass(frozen=True)
class SignalTest:
    """Whether the votes say anything about the answers (`learner.reward.sign_flips`). The tests since one passed, each
    on more votes than the one before it, share one error."""

    # Cross-validated, of choices that name a winner and of thumbs.
    accuracy: Figure
    # Of all tests since one passed; passed at `level` or below. A test of an earlier version has no level.
    p_value: Figure
    level: Figure
    # The votes of this test, in how many conversations, and the votes of the first test since one passed.
    votes: int
    conversations: int
    first_votes: int
    # How many votes would probably suffice, if the votes show any strength.
    enough_votes: int | None
    # Numbers of the sign flips that would have passed by now.
    spent: list[int]

    @property
    def passed(self) -> bool:
        return self.p_value <= self.level

    @property
    def estimate(self) -> int | None:
        """`enough_votes` rounded up to two digits; None if the votes are too weak to say more than that."""
        if self.enough_votes is None or self.enough_votes > MOST_TIMES * self.votes:
            return None
        unit = int(10 ** max(len(str(self.enough_votes)) - 2, 0))
        return -(-self.enough_votes // unit) * unit

    def missing(self, votes: int) -> int:
        """How many more than `votes` would probably pass; 0 if the test was passed or this cannot be estimated."""
        return 0 if self.passed or not self.estimate else max(self.estimate - votes, 0)


@dataclass(frozen=True)
class VoterWeights:
    """How many voters there were, how many count less than half, and the mean weight."""

    voters: int
    doubted: int
    mean_weight: Figure


@dataclass(frozen=True)
class HeldOut:
    """How well scores predict votes they were not fitted on, compared with simpler rules and confounders."""

    votes: int
    accuracy: Figure
    nll: Figure
    ece: Figure
    # Accuracy of the rules that a reward model must beat: prefer the longer answer, or the one of higher temperature.
    longer_wins: Figure
    hotter_wins: Figure
    # Votes on answers of similar length, where length cannot help.
    matched_votes: int
    matched_accuracy: Figure
    # Correlation between the differences in score and in log length.
    length_correlation: Figure


@dataclass(frozen=True)
class RewardModelMetrics(HeldOut):
    """The reward model of the round, on judge votes. The last four, except `l2`, are in sd of reference answers."""

    temperature_effect: Figure
    l2: Figure
    score_low: Figure
    score_high: Figure
    # Imported preferences that it read, and the weight that votes gave to what they say, in sd.
    imported: int = 0
    prior_weight: Figure = 0.0


@dataclass(frozen=True)
class StepMetrics:
    """One step of training. What its improver does not have is NaN. KL in nats per response, entropy in nats per token,
    lengths in tokens."""

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
    """How the policy was improved: the metrics of every step, the steps whose weights were kept, and why it ended."""

    steps: list[StepMetrics]
    candidates: list[int]
    ended_by: EndedBy
    # The KL that training aimed for, and the KL at which it stops.
    kl_target: float | None = None
    kl_budget: float | None = None


@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which the candidate wins, with its interval and the two parts of its standard error: because
    of the prompts, and because of the judge's votes. Rounds of earlier versions stored no parts."""

    rate: Figure
    low: Figure
    high: Figure
    prompts: int
    prompts_sd: Figure = math.nan
    judge_sd: Figure = math.nan

    @property
    def loses(self) -> bool:
        """Whether the candidate certainly loses, or this could not be measured."""
        return not self.high >= 0.5

    def __str__(self) -> str:
        return f"{self.rate:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def explained(self) -> str:
        """With the parts of its error."""
        if math.isnan(self.judge_sd):
            return str(self)
        parts = f"{self.prompts_sd:.2f} by the prompts and {self.judge_sd:.2f} by the judge's votes"
        return f"{self}, with a standard error of {parts}"


@dataclass(frozen=True)
class AnswerHealth:
    """Properties of answers: mean length, and the shares of empty and of ended answers and of repeated 4-grams."""

    length: Figure
    empty: Figure
    ended: Figure
    repetition: Figure


@dataclass(frozen=True)
class CandidateMetrics:
    """Metrics of one candidate on the held-out prompts."""

    step: int
    kl: Figure
    against_incumbent: WinRate
    against_reference: WinRate
    # Win rate against the incumbent by the training reward model; far above the judge's means over-optimisation.
    trained_rate: Figure
    matched_rate: Figure
    matched_answers: int
    health: AnswerHealth
    # None if the incumbent is the best version so far.
    against_best: WinRate | None = None
    # The steps of earlier candidates that are better for certain, by the judge.
    loses_to: list[int] = field(default_factory=list)

    @property
    def promise(self) -> float:
        """The mean of two win rates against the incumbent, by the judge and by the training reward model. The first is
        honest and noisy; the second saw more votes and flatters those that train longest."""
        return (self.against_incumbent.rate + self.trained_rate) / 2

    @property
    def hopeless(self) -> bool:
        """Whether it certainly loses to one of them."""
        return any(rate.loses for rate in self.rates.values())

    @property
    def rates(self) -> dict[str, WinRate]:
        """Its win rate against each opponent."""
        rates = {"incumbent": self.against_incumbent, "reference": self.against_reference}
        return rates | ({"best version so far": self.against_best} if self.against_best else {})


@dataclass(frozen=True)
class FailedCheck:
    """An operator's check that the candidate's answer fails: why, the answer, and whether the incumbent's fails it."""

    name: str
    why: str
    answer: str
    incumbent_failed: bool


@dataclass(frozen=True)
class CheckMetrics:
    """An operator's checks: how many there are, what the candidate fails, how many the incumbent fails, and the scores
    of both by the operator's command, if there is one."""

    checks: int
    failed: list[FailedCheck]
    incumbent_failed: int
    score: Figure = math.nan
    incumbent_score: Figure = math.nan

    def __str__(self) -> str:
        passed, before = self.checks - len(self.failed), self.checks - self.incumbent_failed
        score = "" if math.isnan(self.score) else f", score {self.score:g} ({self.incumbent_score:g})"
        return f"{passed} of {self.checks} passed (the incumbent: {before}){score}"


@dataclass(frozen=True)
class GateMetrics:
    """The chosen candidate on the prompts that confirm it, the rules that it broke, and all candidates on the prompts
    that it was chosen on."""

    chosen: CandidateMetrics
    reasons: list[str]
    candidates: list[CandidateMetrics]
    incumbent_health: AnswerHealth
    # Whether people are to decide between it and the incumbent; if they cannot, why.
    canary: bool = False
    no_canary: str = ""
    # The best of the versions promoted before the incumbent, if it is better.
    best_version: str = ""
    checks: CheckMetrics | None = None


@dataclass(frozen=True)
class RoundMetrics:
    """Metrics of the stages that a round reached; None for the others."""

    votes: VoteCounts | None = None
    prompts: PromptCounts | None = None
    signal: SignalTest | None = None
    voters: VoterWeights | None = None
    reward_model: RewardModelMetrics | None = None
    sft: FineTuned | None = None
    improvement: Improvement | None = None
    gate: GateMetrics | None = None
    # Package versions by name.
    versions: dict[str, str] = field(default_factory=dict)
    # Duration of each stage over all attempts.
    seconds: dict[str, float] = field(default_factory=dict)

    def __or__(self, more: "RoundMetrics") -> "RoundMetrics":
        """These metrics, with those of `more` replacing them."""
        return replace(self, **{name: value for name, value in vars(more).items() if value})

    def to_json(self) -> dict[str, Any]:
        """The non-empty metrics by name, ready for `json.dumps`."""
        dumped: dict[str, Any] = _adapter(RoundMetrics).dump_python(self, mode="json")
        return {name: value for name, value in dumped.items() if value}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RoundMetrics":
        """The inverse of `to_json`. A stage with unknown metrics, from another version, counts as not reached."""
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
