"""A seed is only spent on an answer's own tokens, however its prompt was split."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from server.shared.model.seeds import keep_seeds


class Runner:
    """A minimal model runner of vLLM: three rows, each with its generator, that draw in each step."""

    def __init__(self, device: str, fails: bool = False) -> None:
        self.device = torch.device(device)
        self.input_batch = SimpleNamespace(
            num_reqs=3, generators={row: torch.Generator().manual_seed(row) for row in range(3)}
        )
        # Rows beyond the batch have values of an earlier one.
        self.discard_request_mask = SimpleNamespace(np=np.array([True, False, True, True]))
        self.fails = fails

    def sample_tokens(self, output: Any) -> list[float]:
        if self.fails:
            raise RuntimeError("no")
        generators = self.input_batch.generators
        return [torch.rand(1, generator=generators[row]).item() if row in generators else -1.0 for row in range(3)]


def drawn(seed: int, times: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, generator=generator).item() for _ in range(times)][-1]


def test_discarded_rows_spend_no_seed() -> None:
    runner = Runner("cpu")
    keep_seeds(runner)
    assert runner.sample_tokens(None) == [-1.0, drawn(1, 1), -1.0]
    runner.discard_request_mask.np[:] = False
    assert runner.sample_tokens(None) == [drawn(0, 1), drawn(1, 2), drawn(2, 1)]


def test_a_failed_step_keeps_the_generators() -> None:
    runner = Runner("cpu", fails=True)
    keep_seeds(runner)
    with pytest.raises(RuntimeError):
        runner.sample_tokens(None)
    assert sorted(runner.input_batch.generators) == [0, 1, 2]


def test_on_a_gpu_nothing_is_patched() -> None:
    runner = Runner("cuda")
    keep_seeds(runner)
    assert runner.sample_tokens(None) == [drawn(0, 1), drawn(1, 1), drawn(2, 1)]
