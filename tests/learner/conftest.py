"""A tiny random Llama on disk and in memory, and votes made by hand."""

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.reward.linear_heads import VoteTensors
from tests.words import save_other_words, save_words

WORDS, HIDDEN, LAYERS = 40, 16, 3
# As in the default model: padding and end of sequence are the same token.
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


def save_tiny_model(directory: Path) -> None:
    """The tiny model with a tokenizer of one token per word."""
    tiny_llama().save_pretrained(directory)
    save_words(directory, WORDS, EOS)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory)
    return directory


def save_other_model(directory: Path) -> None:
    """A tiny model of another family with another tokenizer."""
    from tests.families.configs import WORDS as COUNT
    from tests.families.configs import tiny

    tiny("qwen3").save_pretrained(directory)
    save_other_words(directory, COUNT)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("other")
    save_other_model(directory)
    return directory


@pytest.fixture
def make_votes() -> Callable[..., VoteTensors]:
    def make(
        choices: list[tuple[int, int, int]] = [],  # noqa: B006 (read only)
        thumbs: list[tuple[int, int, int]] = [],  # noqa: B006
        users: int = 1,
        temperature_difference: list[float] | None = None,
    ) -> VoteTensors:
        """`choices` (a, b, outcome), `thumbs` (response, +-1, user); every vote in a separate conversation."""
        c, m = len(choices), len(thumbs)

        def column(rows: list[tuple[int, int, int]], index: int) -> torch.Tensor:
            return torch.tensor([row[index] for row in rows], dtype=torch.long)

        return VoteTensors(
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


@pytest.fixture(scope="session")
def voted(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    """A data directory with a reference and 80 votes; copy it. The conversations' ids are the same in every run: which
    of them judge is by their hashes, and a random draw has too few on one side now and then."""
    from transformers import AutoModelForCausalLM

    from server.store.store import Store
    from tests.learner.rounds import low_words, make_reference, vote

    data_dir = tmp_path_factory.mktemp("voted") / "data"
    make_reference(data_dir, model_directory)
    store, numbers = Store.open(data_dir), count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.store.chats.conversations.new_id", lambda prefix: f"{prefix}_05{next(numbers):022x}")
        vote(store, AutoModelForCausalLM.from_pretrained(model_directory).eval(), 80, low_words)
    store.close()
    return data_dir


@pytest.fixture
def data_dir(voted: Path, tmp_path: Path, database: str) -> Path:
    from server.store.store import Store

    copy = tmp_path / "data"
    shutil.copytree(voted, copy)
    if database == "postgres":
        for _ in Store.migrate(copy, "postgres"):
            pass
        (copy / "prefloop.db").unlink()
    return copy
