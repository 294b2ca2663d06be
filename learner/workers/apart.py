"""A worker's engine in a process of its own, on a GPU of its own where there are any.

`EngineProcess` has the methods of a `RolloutEngine` and passes each call on. Weights go through shared memory, one
tensor at a time; on a GPU, by way of the CPU.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch import Tensor

from learner.model.rollout import SampledAnswer
from learner.process import end_with_parent
from learner.settings import LearnerSettings
from learner.workers.job import KilledError
from server.shared.model.dtype import DtypeName
from server.store.chats.records import Prompt

# How long an engine may take to end by itself.
END_SECONDS = 30.0


class EngineProcess:
    """Starts the process and makes an engine in it. `visible_gpu`: its CUDA_VISIBLE_DEVICES; None: as here. A call
    raises RuntimeError if the engine failed, and KilledError if its process ended."""

    def __init__(
        self,
        directory: Path,
        settings: LearnerSettings,
        dtype: DtypeName,
        max_model_len: int,
        visible_gpu: str | None,
        make: Callable[..., Any],
    ) -> None:
        spawn = torch.multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=serve, args=(theirs, visible_gpu, make, (directory, settings, dtype, max_model_len)), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer()

    def push(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.push`."""
        self._send("push")
        for name, tensor in weights:
            self._send((name, tensor.detach().cpu()))
            # Answered when the engine has read it: only one tensor is in memory a third time.
            self._answer()
        self._send(None)
        self._answer()

    def sample(
        self, prompts: list[Prompt], seed: int, temperature: float | None = None, first: int = 0
    ) -> list[SampledAnswer]:
        """See `RolloutEngine.sample`."""
        self._send("sample")
        self._send((prompts, seed, temperature, first))
        found: list[SampledAnswer] = self._answer()
        return found

    def sleep(self) -> None:
        """Its memory is nobody else's."""

    def close(self) -> None:
        """Ends the process."""
        self._ours.close()
        self._process.join(END_SECONDS)
        self._process.kill()

    def _send(self, value: Any) -> None:
        try:
            self._ours.send(value)
        except OSError:
            raise KilledError("An engine apart was killed.") from None

    def _answer(self) -> Any:
        try:
            failed, value = self._ours.recv()
        except (EOFError, OSError):
            raise KilledError("An engine apart was killed.") from None
        if failed:
            raise RuntimeError(f"An engine apart failed: {value}")
        return value


def received(pipe: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that are sent, each of which is answered when the next is asked for."""
    while (weight := pipe.recv()) is not None:
        yield weight
        pipe.send((False, None))


def serve(pipe: Any, visible_gpu: str | None, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answers calls until the other end closes."""
    end_with_parent()
    if visible_gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu
    try:
        engine = make(*arguments)
        pipe.send((False, None))
        while True:
            call = pipe.recv()
            if call == "push":
                engine.push(received(pipe))
                pipe.send((False, None))
            else:
                prompts, seed, temperature, first = pipe.recv()
                pipe.send((False, engine.sample(prompts, seed, temperature, first)))
    except EOFError:
        engine.close()
    except Exception as error:
        pipe.send((True, f"{type(error).__name__}: {error}"))
