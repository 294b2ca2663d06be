"""Estimates tokens/s from the model's matrix products, measured on this machine, and their share of a step.

A step's other parts (attention, sampling, the scheduler, Python) are not measured. They take about as long as the
products of a few rows, and half as long as those of many. So if the products of n rows take S seconds, n answers come
at about DECODE_SHARE * n / S tokens/s, and prompts are read at PREFILL_SHARE * n / S. The accuracy of the estimate is
in docs/decisions/0027-doctor.md.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.shared.model.dtype import DtypeName, torch_dtype
from server.shared.model.shape import Matrix, ModelShape

if TYPE_CHECKING:
    import torch

DECODE_SHARE = 0.5
PREFILL_SHARE = 0.67
STREAMS = 16
PREFILL_ROWS = 256
# Memory for test weights of one width: more than the cores' own caches hold, but little compared with a model.
BUDGET_BYTES = 64 * 2**20
REPEATS, REPEAT_SECONDS = 5, 0.5


@dataclass(frozen=True)
class Speed:
    """Tokens/s of one answer, of sixteen together, and of prompts."""

    one: float
    sixteen: float
    prefill: float


@dataclass(frozen=True)
class Sample:
    """Stand-ins for all matrices with the same number of columns: `copies` of (rows, columns). All products together
    take `times` as long as one with a stand-in."""

    rows: int
    columns: int
    copies: int
    times: float


def expected(one: float, sixteen: float, prefill: float) -> Speed:
    """The speed from the seconds of all products at 1, 16 and 256 rows."""
    return Speed(DECODE_SHARE / one, DECODE_SHARE * STREAMS / sixteen, PREFILL_SHARE * PREFILL_ROWS / prefill)


def measure(shape: ModelShape, dtype: DtypeName, threads: int) -> Speed:
    """Measure the products, in less than a second on two cores, and estimate the speed."""
    import torch

    torch.set_num_threads(threads)
    kind = torch_dtype(dtype)
    layers = [(sample, _weights(sample, kind)) for sample in samples(shape.matrices, kind.itemsize)]
    head = [(sample, _weights(sample, kind)) for sample in samples({shape.head: 1}, kind.itemsize)]
    with torch.inference_mode():
        # In a prompt only the last token needs logits.
        return expected(
            _seconds(layers + head, 1), _seconds(layers + head, STREAMS), _seconds(layers, PREFILL_ROWS, copies=1)
        )


def samples(matrices: Mapping[Matrix, int], itemsize: int) -> list[Sample]:
    """Samples within the budget. Matrices of the same width count as one per layer, since engines join those that share
    their input."""
    layers = min(matrices.values())
    rows: Counter[int] = Counter()
    for (outputs, columns), count in matrices.items():
        rows[columns] += outputs * count
    found = []
    for columns, total in rows.items():
        fitting = max(1, BUDGET_BYTES // (columns * itemsize))
        each = min(total // layers, fitting)
        found.append(Sample(each, columns, min(layers, fitting // each), total / each))
    return found


def _weights(sample: Sample, dtype: "torch.dtype") -> "list[torch.Tensor]":
    import torch

    # Not zeros, whose pages would all be the same one.
    return [torch.full((sample.rows, sample.columns), 0.01, dtype=dtype) for _ in range(sample.copies)]


def _seconds(parts: "list[tuple[Sample, list[torch.Tensor]]]", rows: int, copies: int | None = None) -> float:
    """Seconds of the products of `rows` rows with all matrices, measured with `copies` of each sample, or all."""
    return sum(sample.times * _product_seconds(weights[:copies], rows) for sample, weights in parts)


def _product_seconds(weights: "list[torch.Tensor]", rows: int) -> float:
    """Average seconds of one product, in the fastest pass."""
    import torch
    from torch.nn.functional import linear

    inputs = torch.full((rows, weights[0].shape[1]), 0.01, dtype=weights[0].dtype)
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < REPEAT_SECONDS:
        started = time.perf_counter()
        for weight in weights:
            linear(inputs, weight)
        taken.append(time.perf_counter() - started)
    return min(taken) / len(weights)
