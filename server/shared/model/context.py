"""How long a model's texts may be."""

from pathlib import Path

# The names that families give it in their configuration.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_length(directory: Path, most: int) -> int:
    """Tokens of a prompt and its answer together, at most `most`, that the model in `directory` has positions for.

    Some families have no such limit: BLOOM uses distances, Mamba a state."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory).get_text_config()
    lengths: list[int] = [length for name in NAMES if (length := getattr(config, name, None))]
    return min([most, *lengths])
