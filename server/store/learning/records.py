"""The store's records of versions, rounds, servers and learners: frozen, and independent of SQL and protobuf."""

from dataclasses import dataclass, field
from typing import Any, Literal

from server.store.learning.round_metrics import RoundMetrics

# Why the pointer moved: by a round's gate or an RPC, promoted by an operator, rolled back, or a version failed to load.
PointerAction = Literal["activate", "promote", "rollback", "fail"]
# Whether a round trains on a vote or judges by it.
Side = Literal["train", "judge"]
# What a round learns from: votes, or demonstrations and corrections, whose version becomes the reference.
RoundState = Literal["running", "promoted", "canary", "rejected", "failed"]
RoundKind = Literal["alignment", "sft"]


@dataclass(frozen=True)
class PolicyVersion:
    """A published version. `state` is its place in the life cycle."""

    version: str
    state: Literal["candidate", "canary", "active", "retired", "rejected", "failed"]
    kind: Literal["adapter", "full"]
    parent_version: str | None
    # What the KL of its rounds is measured from, and the version that was made from a model: versions of one origin
    # are of one model and one tokenizer, and an engine can load all of them.
    reference_version: str
    origin_version: str
    round_id: str | None
    reward_model_version: str | None
    metrics: dict[str, Any]
    reason: str
    create_time: float
    activate_time: float | None
    # When its directory was removed; the record stays.
    prune_time: float | None = None


@dataclass(frozen=True)
class RewardModelVersion:
    """A fitted reward model."""

    version: str
    reference_version: str
    round_id: str | None
    metrics: dict[str, Any]
    create_time: float


@dataclass(frozen=True)
class Round:
    """One run of the learner: `stage` is the last finished step."""

    id: str
    state: RoundState
    stage: str
    watermark: int
    incumbent_version: str
    reference_version: str
    policy_version: str | None
    reward_model_version: str | None
    settings: dict[str, Any]
    metrics: RoundMetrics
    reason: str
    create_time: float
    finish_time: float | None
    # How often it was started or resumed, minus how often it stopped on request.
    attempts: int = 1
    # Users whose votes it leaves out: those in quarantine when it began.
    quarantined: list[str] = field(default_factory=list)
    # The machine judge whose choices it read, if any, and the newest of all judges' at that time.
    judge: str = ""
    machine_watermark: int = 0
    kind: RoundKind = "alignment"


@dataclass(frozen=True)
class CanaryTerms:
    """When a canary is decided. Every server reads the same terms, and so decides alike."""

    # Promote it at this evidence that it is better, reject it at this evidence that it is worse.
    evidence: float
    # After so many choices that count without a decision, or so many days, the wait ends.
    max_votes: int
    days: float
    # Each user's first `user_votes` choices count, every `unit` of them together as their mean.
    unit: int
    user_votes: int
    # Then promote it all the same if chance alone says as much for it at most this often; 0: never.
    last_level: float = 0.0


@dataclass(frozen=True)
class Canary:
    """A version that waits until choices between its answers and its opponent's decide whether it is served."""

    version: str
    opponent_version: str
    round_id: str
    evidence: float
    max_votes: int
    unit: int
    user_votes: int
    create_time: float
    expire_time: float
    end_time: float | None = None
    outcome: str = ""
    last_level: float = 0.0


@dataclass(frozen=True)
class PointerEvent:
    """The pointer moved to `version`."""

    seq: int
    version: str
    previous_version: str | None
    action: PointerAction
    actor: str
    reason: str
    create_time: float


@dataclass(frozen=True)
class QuarantineEvent:
    """An operator's decision on whether a user's votes are left out."""

    seq: int
    user: str
    action: Literal["set", "lift"]
    actor: str
    reason: str
    create_time: float


@dataclass(frozen=True)
class Replica:
    """A server and what it has loaded."""

    id: str
    loaded_version: str
    error: str
    heartbeat_time: float
    # Seconds since the heartbeat, by the clock that cannot be set.
    age: float


@dataclass(frozen=True)
class RoundRequest:
    """A request to run a round now; `outcome` is a sentence once it is over."""

    create_time: float
    end_time: float | None
    outcome: str


@dataclass(frozen=True)
class Learner:
    """The learner's state, as far as it is in the store."""

    # Whether a learner listens for requests.
    listening: bool
    # When the first schedule of a listening learner starts a round; None if only requests do.
    next_time: float | None
    # The round that a learner is working on now; a stopped one is not included.
    running: Round | None
    new_votes: int
    # The last request.
    request: RoundRequest | None


@dataclass(frozen=True)
class Lease:
    """The exclusive right to do something for a limited time. A later holder has a higher token."""

    name: str
    holder: str
    token: int
