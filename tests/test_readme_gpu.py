"""README's table of what fits on which GPU, computed again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from server.shared.gpu_shares import BESIDE_ENGINES
from server.shared.machine import GIB
from server.shared.model.needs import Training, round_need, server_need
from server.shared.model.shape import shape_of

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


@pytest.mark.parametrize(("model", "card"), [("SmolLM2-135M", 12), ("Qwen2.5-1.5B", 24), ("Qwen2.5-7B", 80)])
def test_what_fits_on_a_gpu(model: str, card: int) -> None:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(MODELS[model])
    shape = shape_of({name: list(parameter.shape) for name, parameter in made.named_parameters()})
    server = server_need(shape, "bfloat16", 2) / GIB
    # A rollout of 32 answers of 512 tokens.
    kept, again = (
        round_need(shape, "bfloat16", 2, Training("lora", 16, 2048, 32 * 512, checkpoint)).total / GIB
        for checkpoint in (False, True)
    )
    assert f"| {model} | {server:.1f} | {kept:.1f} | {again:.1f} | {card} GB |" in README
    assert server + again < (1 - BESIDE_ENGINES) * card
