"""An engine in a process of its own: what reaches it, what comes back, and how it ends."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.process import show_gpus
from learner.settings import LearnerSettings
from learner.worker_settings import WorkerSettings
from learner.workers.apart import EngineProcess
from learner.workers.job import KilledError
from learner.workers.ray_actors import needs_of_a_worker
from server.store.chats.records import Prompt

SETTINGS: Any = LearnerSettings(seed=7)


class Remembering:
    """It answers with what it was given; it fails or is killed where a prompt or a weight says so."""

    def __init__(self, directory: Path, settings: LearnerSettings, dtype: str, max_model_len: int) -> None:
        if dtype == "bfloat16":
            raise ValueError("it does not start")
        self.known: list[Any] = [directory.name, settings.seed, max_model_len, os.environ.get("CUDA_VISIBLE_DEVICES")]

    def push(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "wrong":
                raise ValueError(f"{name} has no place")
            self.known.append((name, tensor.tolist(), str(tensor.dtype)))

    def sample(self, prompts: list[Prompt], seed: int, temperature: float | None, first: int) -> list[Any]:
        if seed == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return [self.known, [prompt.token_ids for prompt in prompts], seed, temperature, first]

    def close(self) -> None:
        pass


def engine(gpu: str | None = None, dtype: Any = "float32") -> EngineProcess:
    return EngineProcess(Path("/some/v0000"), SETTINGS, dtype, 64, gpu, Remembering)


def test_calls_and_weights_reach_it() -> None:
    with closing(engine("5")) as apart:
        apart.push(iter([("a", torch.tensor([1.5, 2.0], dtype=torch.bfloat16)), ("b", torch.ones(1))]))
        apart.sleep()
        assert apart.sample([Prompt("", [3, 4], 8)], 11, first=2) == [
            ["v0000", 7, 64, "5", ("a", [1.5, 2.0], "torch.bfloat16"), ("b", [1.0], "torch.float32")],
            [[3, 4]],
            11,
            None,
            2,
        ]


def test_a_failure_comes_back() -> None:
    with pytest.raises(RuntimeError, match=r"^An engine apart failed: ValueError: it does not start$"):
        engine(dtype="bfloat16")
    with closing(engine()) as apart, pytest.raises(RuntimeError, match=r"ValueError: wrong has no place$"):
        apart.push(iter([("a", torch.ones(1)), ("wrong", torch.ones(1)), ("b", torch.ones(1))]))


def test_a_killed_engine_is_no_failure() -> None:
    with closing(engine()) as apart, pytest.raises(KilledError, match=r"^An engine apart was killed\.$"):
        apart.sample([], -1)


@pytest.mark.parametrize(
    ("place", "count", "before", "seen"),
    [(1, 1, None, "1"), (1, 2, None, "2,3"), (0, 2, "4,6,7", "4,6"), (1, 2, "4,6,7", "7,-1")],
)
def test_a_worker_sees_its_gpus(
    place: int, count: int, before: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    show_gpus(place, count)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_ray_reserves_a_second_gpu_for_an_engine_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = WorkerSettings(count=1, engines="apart")
    assert needs_of_a_worker(apart, "cpu") == {"CPU": 1}
    monkeypatch.setattr("learner.workers.ray_actors.resolve_device", lambda name: torch.device("cuda"))
    assert needs_of_a_worker(apart, "cuda") == {"GPU": 2}
    assert needs_of_a_worker(WorkerSettings(count=1), "cuda") == {"GPU": 1}
    with pytest.raises(ValueError, match=r"workers\.engines = apart needs workers\.count"):
        WorkerSettings(engines="apart")
