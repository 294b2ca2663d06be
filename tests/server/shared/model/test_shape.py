"""The shape of a model from the headers of its files, for layers and experts of every kind of name."""

import json
from pathlib import Path

import pytest

from server.shared.model.shape import ModelShape, chosen_experts, shape_of


def test_the_shape_of_a_checkpoint() -> None:
    tensors = {
        "model.embed_tokens.weight": [100, 8],
        "model.layers.0.q.weight": [8, 8],
        "model.layers.0.k.weight": [4, 8],
        "model.layers.1.q.weight": [8, 8],
        "model.layers.1.norm.weight": [8],
        "lm_head.weight": [100, 8],
    }
    assert shape_of(tensors) == ModelShape(1768, (100, 8), {(8, 8): 2, (4, 8): 1}, layers=2, outputs=20)


@pytest.mark.parametrize("prefix", ["model.layers", "transformer.h", "h", "gpt_neox.layers", "blk", "backbone.layers"])
def test_layers_are_counted_by_their_numbers(prefix: str) -> None:
    tensors = {
        "wte.weight": [100, 8],
        "wpe.weight": [50, 8],
        **{f"{prefix}.{layer}.attn.{part}.weight": [16, 8] for layer in range(12) for part in ("q", "k")},
    }
    found = shape_of(tensors)
    # Positions are no layer's.
    assert (found.layers, found.outputs) == (12, 12 * 2 * 16)


@pytest.mark.parametrize(("chosen", "outputs"), [(2, 2 * 16 + 8 + 8), (4, 4 * 16 + 8 + 8), (None, 4 * 16 + 8 + 8)])
def test_a_token_is_sent_to_some_experts(chosen: int | None, outputs: int) -> None:
    """Beside them, it passes the other matrices of the layer, and experts that all tokens share."""
    rest = {"embed.weight": [100, 8], "layers.0.q.weight": [8, 8], "layers.0.mlp.shared_experts.up.weight": [8, 8]}
    apart = {f"layers.0.mlp.experts.{expert}.up.weight": [16, 8] for expert in range(4)}
    assert shape_of(rest | apart, chosen).outputs == outputs
    # The experts of a layer as one tensor.
    assert shape_of(rest | {"layers.0.mlp.experts.up": [4, 16, 8]}, chosen).outputs == outputs
    assert shape_of(rest | apart, chosen).parameters == 800 + 64 + 64 + 4 * 128


def test_a_convolution_is_not_experts() -> None:
    tensors = {"embed.weight": [100, 8], "layers.0.in.weight": [8, 8], "layers.0.conv1d.weight": [16, 1, 4]}
    assert shape_of(tensors).outputs == 8


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_experts_per_tok": 2}, 2),
        ({"moe_k": 6}, 6),
        ({"text_config": {"num_experts_per_tok": 8}}, 8),
        ({"num_experts_per_tok": None}, None),
        ({}, None),
    ],
)
def test_the_configuration_says_how_many_experts(
    tmp_path: Path, config: dict[str, object], expected: int | None
) -> None:
    assert chosen_experts(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert chosen_experts(tmp_path) == expected
