"""The interface of all ways to improve a policy: their inputs and their result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from learner.improve.budget import Budget
from learner.model.policy import TrainablePolicy
from learner.model.rollout import Rollout, SampledAnswer, draw_seed, to_rollout
from learner.reward.base import RewardModel
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import Improvement, StepMetrics


class SamplingEngine(Protocol):
    """What samples: a `RolloutEngine`, in this process or another."""

    def push(self, weights: Iterator[tuple[str, Tensor]]) -> None: ...

    def sample(
        self, prompts: list[Prompt], seed: int, temperature: float | None = None, first: int = 0
    ) -> list[SampledAnswer]: ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ExperienceSource:
    """A source of answers: an engine and the prompts for it. `seed` is the round's."""

    engine: SamplingEngine
    prompts: list[Prompt]
    temperature: float
    seed: int

    def batches(self, size: int) -> Iterator[list[Prompt]]:
        """Endless batches of prompts; each prompt comes once before any is repeated. The seed decides the order."""
        return ([self.prompts[number] for number in numbers] for numbers in endless(len(self.prompts), size, self.seed))

    def rollout(self, policy: TrainablePolicy, prompts: list[Prompt], draw: int) -> Rollout:
        """Answers of the current policy, on its device, sampled with the round's random numbers for this draw. Each
        worker's engine samples a share of them.

        The engine then sleeps until the next push."""
        self.engine.push(policy.engine_weights())
        own = policy.group.shares(len(prompts))[policy.group.rank]
        samples = self.engine.sample(prompts[own.start : own.stop], draw_seed(self.seed, draw), first=own.start)
        self.engine.sleep()
        return to_rollout(policy.group.gather(samples)).to(policy.model.device)


def endless(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of the numbers below `count`; each comes once before any is repeated."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


@dataclass(frozen=True)
class Task:
    """What to improve: a policy, by a reward model, on a source's prompts, within a budget. Candidates are left in
    `directory` (`learner.improve.candidates`), and `on_step` hears of each step."""

    policy: TrainablePolicy
    source: ExperienceSource
    reward_model: RewardModel
    budget: Budget
    directory: Path
    on_step: Callable[[StepMetrics], None]


class Improver(Protocol):
    """A way to improve a policy."""

    def improve(self, task: Task) -> Improvement:
        """Trains the policy. If a call was killed, the next one resumes from what it left in the directory, with the
        same result; it calls `on_step` for the steps that were done, too."""
        ...
