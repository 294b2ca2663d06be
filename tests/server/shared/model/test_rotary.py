"""Which of a rotary embedding's two ways is taken. With vLLM's own, the DeepSeek families of tests/families use it."""

from typing import Any

import torch

from server.shared.model.rotary import rotate_every_head


class FakeRotary:
    def forward_cpu(self, positions: Any, query: Any, key: Any = None) -> str:
        return "kernel"

    def forward_native(self, positions: Any, query: Any, key: Any = None) -> str:
        return "native"


def test_only_queries_with_a_dimension_of_heads_are_rotated_by_pytorch() -> None:
    # Twice, as by two engines in one process.
    for _ in range(2):
        rotate_every_head(FakeRotary)
    layer, positions = FakeRotary(), torch.arange(3)
    assert layer.forward_cpu(positions, torch.zeros(3, 4 * 8), torch.zeros(3, 8)) == "kernel"
    assert layer.forward_cpu(positions, torch.zeros(3, 4, 8), torch.zeros(3, 1, 8)) == "native"
    assert layer.forward_cpu(positions, torch.zeros(3, 4, 8)) == "native"
