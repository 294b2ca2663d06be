"""How long a model's texts may be."""

from pathlib import Path
from typing import Any

from server.shared.model.load import load_config

# The names that families give it in their configuration.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_length(directory: Path, most: int, trust_remote_code: bool = False) -> int:
    """Tokens of a prompt and its answer together, at most `most`, that the model in `directory` has positions for."""
    return min([most, *positions(load_config(directory, trust_remote_code))])


def positions(config: Any) -> list[int]:
    """How many positions a model has, by each name that its transformers configuration has for it.

    Some families have no such limit: BLOOM uses distances, Mamba a state."""
    text = config.get_text_config()
    return [length for name in NAMES if (length := getattr(text, name, None))]
