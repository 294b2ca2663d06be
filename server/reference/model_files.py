"""What is wrong with a model's directory, judged by its files alone: only headers and small files are read."""

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

# The weights that transformers loads: the first of these that exists, or the files that its index names.
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
# Everything else that is read.
TABLES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
          "added_tokens.json", "vocab.json")  # fmt: skip
TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
# At least one of these holds the tokens.
TOKENS = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
QUANTISED = ("quantize_config.json", "quant_config.json")

POINTER = b"version https://git-lfs.github.com/spec/v1"
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
FLOATS = {"F64", "F32", "F16", "BF16"}
AGAIN = "download it again."
MOST_CHARACTERS = 200


class ModelError(Exception):
    """What is wrong with a model, as the end of a sentence that begins with its name."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Run the calls of libraries that read `what`. Raises ModelError with the first line of any error of theirs."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot be used: its {what} cannot be read ({first_line(error)}); download it again, or give another "
            "model."
        ) from error


def first_line(error: Exception) -> str:
    """The first sentence of an error's first line, without its full stop; with the name of its type if that says
    more."""
    lines = str(error).strip().splitlines()
    name, line = type(error).__name__, lines[0].split(". ")[0].rstrip(".: ")[:MOST_CHARACTERS] if lines else ""
    return line if line and not isinstance(error, LookupError) else f"{name} {line}".strip()


def check_files(directory: Path, *, weights: bool = True) -> None:
    """Raise ModelError unless `directory` has all files of a model, except its weights if not `weights`, each of them
    whole, and they do not say that it is quantised."""
    names = list_names(directory)
    if "adapter_config.json" in names:
        raise ModelError("is a LoRA adapter, not a whole model: merge it into its base model, and give the result.")
    found = weight_files(directory) if weights else []
    for name in [*TABLES, *QUANTISED]:
        if name in names:
            read_table(directory / name)
    for name in TEXTS:
        if name in names:
            text_of(directory / name)
    if not any(any(directory.glob(pattern)) for pattern in TOKENS):
        raise ModelError("has no tokenizer (tokenizer.json); download the whole model.")
    for pattern in ("*.model", "*.tiktoken"):
        for path in directory.glob(pattern):
            _read_start(path)
    _check_not_quantised(directory, names)
    for path in found:
        _check_weights(path)


def list_names(directory: Path) -> set[str]:
    """The names of the files in a model's directory. Raises ModelError unless there is a config.json."""
    if not os.access(directory, os.R_OK | os.X_OK, effective_ids=True):
        raise ModelError("cannot be read (Permission denied); make it readable for this user.")
    names = set(os.listdir(directory))
    if not {"config.json", "adapter_config.json"} & names:
        if any(name.endswith(".gguf") for name in names):
            raise ModelError("has only GGUF weights, which are quantised; give the unquantised model (*.safetensors).")
        raise ModelError("has no config.json: it is not a Hugging Face model directory.")
    return names


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers loads weights from. Raises ModelError if one is missing."""
    for name in (SAFETENSORS, TORCH):
        path, index = directory / name, directory / (name + INDEX)
        # A directory with both is half a download, or was saved into twice.
        shards = _shards(index) if os.path.isfile(index) else []
        if os.path.isfile(path) or shards:
            return [path] if os.path.isfile(path) else shards
    parts = sorted(path.name for path in directory.glob("*-of-*") if path.suffix in (".safetensors", ".bin"))
    if parts:
        whole = SAFETENSORS if parts[0].endswith(".safetensors") else TORCH
        raise ModelError(f"lacks {whole}{INDEX}; download the whole model.")
    if any(directory.glob("*.gguf")):
        raise ModelError("has only GGUF weights, which are quantised; give the unquantised model (*.safetensors).")
    raise ModelError("has no weights (*.safetensors); download the whole model.")


def is_safetensors(directory: Path) -> bool:
    """Whether transformers reads the weights in `directory` from safetensors, which have headers."""
    return all(path.suffix == ".safetensors" for path in weight_files(directory))


def read_headers(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """The dtype and shape of each tensor that transformers reads, by name, from the headers of safetensors files; empty
    for PyTorch's. Raises ModelError."""
    files = weight_files(directory)
    return {name: header for path in files if path.suffix == ".safetensors" for name, header in _header(path).items()}


def read_table(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError."""
    text = text_of(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"cannot be used: its {path.name} is not JSON; {AGAIN}") from error
    if not isinstance(found, dict):
        raise ModelError(f"cannot be used: its {path.name} is not a JSON object; {AGAIN}")
    return found


def text_of(path: Path) -> str:
    """A text file's content. Raises ModelError."""
    _read_start(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"cannot be used: its {path.name} is not UTF-8; {AGAIN}") from error


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    try:
        with safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except Exception as error:
        where = f"{path.parent.name}/{path.name}"
        reason = f"{where} is not a valid safetensors file ({first_line(error)})"
        raise ModelError(f"cannot be read: {reason}. Download it again.") from error


def _read_start(path: Path) -> bytes:
    """The first bytes of a file. Raises ModelError for a file without content."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise ModelError(
            f"cannot be used: its {path.name} cannot be read ({error.strerror}); make it readable for this user."
        ) from error
    if not start:
        raise ModelError(f"cannot be used: its {path.name} is empty; {AGAIN}")
    if start == POINTER:
        raise ModelError(f"has only a Git LFS pointer for {path.name}; run `git lfs pull` in its directory.")
    return start


def shard_names(index: Path) -> list[str]:
    """The files that an index of sharded weights names. Raises ModelError."""
    names = read_table(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"cannot be used: its {index.name} names no files; {AGAIN}")
    return sorted(set(names.values()))


def _shards(index: Path) -> list[Path]:
    shards = [index.parent / name for name in shard_names(index)]
    if missing := [shard.name for shard in shards if not os.path.isfile(shard)]:
        raise ModelError(f"lacks {missing[0]}; download the whole model.")
    # transformers needs it, though it may be empty.
    if not isinstance(read_table(index).get("metadata"), dict):
        raise ModelError(f"cannot be used: its {index.name} has no metadata; {AGAIN}")
    return shards


def _check_weights(path: Path) -> None:
    start = _read_start(path)
    if path.suffix == ".safetensors":
        for name, (dtype, _) in _header(path).items():
            if dtype.startswith(("F4", "F6", "F8")) or (name.endswith("weight") and dtype not in FLOATS):
                raise _quantised(f"{name} is {dtype}")
    elif not (zipfile.is_zipfile(path) if start.startswith(ZIP) else start.startswith(PICKLE)):
        raise ModelError(f"cannot be read: {path.name} is not a whole PyTorch file. Download it again.")


def _check_not_quantised(directory: Path, names: set[str]) -> None:
    config = read_table(directory / "config.json")
    text = config.get("text_config")
    for table in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if (settings := table.get(key)) is not None:
                method = settings.get("quant_method") if isinstance(settings, dict) else None
                raise _quantised(str(method or key))
    if found := sorted(names & set(QUANTISED)):
        raise _quantised(found[0])


def _quantised(how: str) -> ModelError:
    return ModelError(f"is quantised ({how}), and a quantised model cannot be trained; give the unquantised model.")
