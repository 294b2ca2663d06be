"""What workers need to train a policy: files and plain values, no models."""

from dataclasses import dataclass
from pathlib import Path

from learner.improve.budget import Budget
from learner.improve.dpo.votes import WeighedVotes
from learner.settings import LearnerSettings
from server.shared.model.dtype import DtypeName
from server.store.chats.records import Prompt


class KilledError(RuntimeError):
    """A worker was killed, or its machine was lost: the same job can be started again."""


@dataclass(frozen=True)
class TrainingJob:
    """A policy to improve, from the files of its round; every worker must find them by these paths.

    `start`: the version whose weights it starts from, if not the reference's. `longest`: the tokens that the engines
    have room for. `votes`: only for an improver that trains on them."""

    settings: LearnerSettings
    dtype: DtypeName
    reference: Path
    start: Path | None
    reward_model: Path
    prompts: list[Prompt]
    votes: WeighedVotes | None
    budget: Budget
    longest: int
    directory: Path
