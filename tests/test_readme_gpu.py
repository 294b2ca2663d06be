"""README's table of what fits on which GPU, computed again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from server.shared.gpu_shares import BESIDE_ENGINES
from server.shared.machine import GIB
from server.shared.model.needs import Training, round_need, version_size
from server.shared.model.shape import ModelShape, shape_of

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODELS: dict[str, Any] = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip


# A GPU's memory that neither engine nor trainer has: two CUDA contexts.
CONTEXTS = 1.0
# The least key-value cache that is of use, and what an engine needs beside its weights.
CACHE = 2.0


def shape(model: str) -> ModelShape:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(MODELS[model])
    return shape_of({name: list(parameter.shape) for name, parameter in made.named_parameters()})


def trainers(model: str, tokens: int, checkpoint: bool) -> float:
    """GiB of a round beside its engine."""
    need = round_need(shape(model), "bfloat16", 0, Training("lora", 16, tokens, 32 * 512, checkpoint))
    return (need.total - need.engine) / GIB


@pytest.mark.parametrize(
    ("model", "card", "server", "learner"),
    [("SmolLM2-135M", 12, 0.35, 0.25), ("Qwen2.5-1.5B", 24, 0.35, 0.25), ("Qwen2.5-7B", 80, 0.3, 0.25)],
)
def test_what_fits_on_a_gpu(model: str, card: int, server: float, learner: float) -> None:
    weights = version_size(shape(model), "bfloat16") / GIB
    kept, again = (trainers(model, 2048, checkpoint) for checkpoint in (False, True))
    row = f"| {model} | {weights:.1f} | {kept:.1f} | {again:.1f} | {card} GB | {server}, {learner} |"
    assert row in README
    assert min(server, learner) * card > weights + CACHE
    # What a server with its spare weights leaves free must be enough for the round, by both rules of a round's start.
    free = card - server * card - weights - CONTEXTS
    assert free > learner * card + again
    assert free > (learner + BESIDE_ENGINES) * card


def test_the_formula_is_cautious() -> None:
    """docs/benchmarks/gpu.md: eight rows of 512 tokens and their prompts took 22.26 GiB."""
    assert f"{trainers('Qwen2.5-1.5B', 8 * 555, checkpoint=False):.1f}" == "27.3"
