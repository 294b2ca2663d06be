"""An engine without vLLM for each worker, and what runs in each."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from learner.model.policy import TrainablePolicy
from learner.model.rollout import SampledAnswer
from learner.workers.job import TrainingJob
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import Improvement
from tests.learner.rounds import TinyEngine, draw


class WorkersEngine(TinyEngine):
    """Answers depend on a prompt's number in its draw, not on which worker's engine samples it."""

    def sample(
        self, prompts: list[Prompt], seed: int, temperature: float | None = None, first: int = 0
    ) -> list[SampledAnswer]:
        assert not self.asleep, "no weights were pushed since the engine fell asleep"
        return [
            answer
            for number, prompt in enumerate(prompts, start=first)
            for answer in draw(
                self.model, [prompt.token_ids], [prompt.max_tokens], [self.temperature],
                torch.Generator().manual_seed(1000 * seed + number),
            )
        ]  # fmt: skip


def worker(job: TrainingJob) -> Improvement:
    """In place of `learner.workers.torchrun.worker`. Each worker notes what it holds and how many answers it samples in
    each step, and is killed in the step that a file named after it says, once."""
    from learner.workers import worker

    rank = os.environ["RANK"]
    fatal = job.directory / f"kill-{rank}"

    class Noted(WorkersEngine):
        def sample(self, prompts: list[Prompt], seed: int, *rest: Any, **named: Any) -> list[SampledAnswer]:
            if fatal.exists() and int(fatal.read_text(encoding="utf-8")) == seed:
                fatal.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            note(job.directory, f"sampled-{rank}", len(prompts))
            return super().sample(prompts, seed, *rest, **named)

    class NotedPolicy(TrainablePolicy):
        def shard(self, *arguments: Any) -> None:
            before = sum(parameter.numel() for parameter in self.model.parameters())
            super().shard(*arguments)
            held = sum(part.to_local().numel() for part in self.model.parameters() if isinstance(part, DTensor))
            note(job.directory, f"held-{rank}", held / before)

    # An engine apart is pickled by its name.
    engine = WorkersEngine if job.settings.workers.engines == "apart" else Noted
    vars(worker).update(RolloutEngine=engine, TrainablePolicy=NotedPolicy)
    return worker.train(job)


def note(directory: Path, name: str, value: float) -> None:
    with (directory / name).open("a", encoding="utf-8") as file:
        file.write(f"{value}\n")


def noted(directory: Path, name: str) -> list[float]:
    return [float(line) for line in (directory / name).read_text(encoding="utf-8").splitlines()]
