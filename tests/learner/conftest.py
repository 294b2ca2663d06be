"""A tiny random Llama on disk and in memory, and votes made by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.heads import Votes

WORDS, HIDDEN, LAYERS = 40, 16, 3
# As in the default model: padding and end of sequence are one word.
EOS = PAD = 2


def tiny_llama(seed: int = 0) -> Any:
    """A float32 model of three layers; large initial weights, so that its distribution is far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture
def make_votes() -> Callable[..., Votes]:
    def make(
        choices: list[tuple[int, int, int]] = [],  # noqa: B006 (read only)
        thumbs: list[tuple[int, int, int]] = [],  # noqa: B006
        users: int = 1,
        temperature_difference: list[float] | None = None,
    ) -> Votes:
        """`choices` (a, b, outcome), `thumbs` (response, +-1, user); every vote in a conversation of its own."""
        c, m = len(choices), len(thumbs)

        def column(rows: list[tuple[int, int, int]], index: int) -> torch.Tensor:
            return torch.tensor([row[index] for row in rows], dtype=torch.long)

        return Votes(
            a=column(choices, 0),
            b=column(choices, 1),
            outcome=column(choices, 2),
            temperature_difference=torch.tensor(temperature_difference or [0.0] * c),
            choice_weight=torch.ones(c),
            choice_group=torch.arange(c),
            response=column(thumbs, 0),
            thumb=column(thumbs, 1).float(),
            user=column(thumbs, 2),
            thumb_weight=torch.ones(m),
            thumb_group=torch.arange(c, c + m),
            users=users,
        )

    return make
