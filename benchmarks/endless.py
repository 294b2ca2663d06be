"""A model whose answers never end by themselves, so that all answers of a measurement have the same length."""

import json
import shutil
from pathlib import Path


def copy_without_end(source: Path, directory: Path) -> None:
    """Copies a model, with the tokenizer's last special token, which no answer contains, as end token."""
    from transformers import AutoTokenizer

    staging = directory.with_suffix(".new")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, ignore=shutil.ignore_patterns("manifest.json"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    last = max(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(last)
    tokenizer.save_pretrained(staging)
    for name in ("config.json", "generation_config.json"):
        path = staging / name
        if path.exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": last}))
    staging.rename(directory)
