"""What every way to improve a policy is given, and what it gives back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout, RolloutEngine, draw_seed, to_rollout
from learner.reward.base import RewardModel
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import Improvement, StepMetrics


@dataclass(frozen=True)
class ExperienceSource:
    """Where answers come from: an engine, and what it is asked. `seed` is the round's."""

    engine: RolloutEngine
    prompts: list[Prompt]
    temperature: float
    seed: int

    def batches(self, size: int) -> Iterator[list[Prompt]]:
        """Endless batches of prompts, every prompt once before any is repeated; the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[Prompt] = []
        while True:
            while len(waiting) < size:
                order = torch.randperm(len(self.prompts), generator=generator).tolist()
                waiting += [self.prompts[i] for i in order]
            yield waiting[:size]
            waiting = waiting[size:]

    def rollout(self, policy: TrainablePolicy, prompts: list[Prompt], draw: int) -> Rollout:
        """Answers of the policy as it is now, by the round's random numbers of this draw."""
        self.engine.push(policy.engine_weights())
        return to_rollout(self.engine.sample(prompts, draw_seed(self.seed, draw)))


@dataclass(frozen=True)
class Budget:
    """How far a policy may go: `kl`, sequence KL to the reference in nats."""

    kl: float


class Improver(Protocol):
    """Improves a policy by a reward model, within a budget."""

    def improve(
        self,
        policy: TrainablePolicy,
        source: ExperienceSource,
        reward_model: RewardModel,
        budget: Budget,
        directory: Path,
        on_step: Callable[[StepMetrics], None],
    ) -> Improvement:
        """Trains `policy` and leaves candidates in `directory` (`learner.improve.candidates`).

        A call that was killed goes on from what it left there, to the same end, and calls `on_step` for the steps that
        were done, too."""
        ...
