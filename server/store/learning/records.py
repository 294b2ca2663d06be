"""What the store hands out of versions, rounds and whoever works on them: frozen, free of SQL and of protobuf."""

from dataclasses import dataclass, field
from typing import Any, Literal

from server.store.learning.round_metrics import RoundMetrics

# How the pointer came to move: by a round's gate or an RPC, by an operator's word, back, or off what cannot be loaded.
PointerAction = Literal["activate", "promote", "rollback", "fail"]
# Whether a round trains on a vote or judges by it.
Side = Literal["train", "judge"]


@dataclass(frozen=True)
class PolicyVersion:
    """A published version. `state` tells where in its life it is."""

    version: str
    state: Literal["candidate", "active", "retired", "rejected", "failed"]
    kind: Literal["adapter", "full"]
    parent_version: str | None
    reference_version: str
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
    state: Literal["running", "promoted", "rejected", "failed"]
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
    # How often it was started or resumed, less how often it stopped because it was asked to.
    attempts: int = 1
    # Whose votes it leaves out: those in quarantine when it began.
    quarantined: list[str] = field(default_factory=list)


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
    """An operator's word on whether a user's votes are left out."""

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
    # Seconds since the heartbeat, by the database's clock.
    age: float


@dataclass(frozen=True)
class RoundRequest:
    """Somebody's word that a round should run now; `outcome` is a sentence once it is over."""

    create_time: float
    end_time: float | None
    outcome: str


@dataclass(frozen=True)
class Learner:
    """What can be said of the learner from what it writes down."""

    # Whether one hears requests.
    listening: bool
    # Of those that listen, when the first one's clock starts a round; None where only requests do.
    next_time: float | None
    # At work now; a round that was stopped is not.
    running: Round | None
    new_votes: int
    # The last one.
    request: RoundRequest | None


@dataclass(frozen=True)
class Lease:
    """The right to do a thing alone for a while. A later holder has a higher token."""

    name: str
    holder: str
    token: int
