"""Fetches a model by its Hugging Face id, small files first: one that they show to be unusable costs no download."""

import os
from collections.abc import Sequence
from pathlib import Path

from server.reference.model_files import INDEX, SAFETENSORS, TORCH, ModelError, first_line, shard_names, weight_files

OFFLINE = "is not on this machine, and HF_HUB_OFFLINE forbids fetching it: give --model a directory."
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


def fetch_small_files(model: str) -> Path:
    """The directory of an id's files except its weights, in Hugging Face's cache. Raises ModelError."""
    return _fetch(model, None, SMALL)


def fetch_weights(model: str, directory: Path) -> None:
    """Fetch the weights that transformers would load into the directory of the other files. Raises ModelError."""
    for name in (SAFETENSORS, TORCH):
        index = directory / (name + INDEX)
        wanted = shard_names(index) if index.exists() else [name]
        if not all(os.path.exists(directory / file) for file in wanted):
            _fetch(model, directory.name, wanted)
        if all(os.path.exists(directory / file) for file in wanted):
            return


def cached(model: str) -> Path | None:
    """The directory of an id's files, if they were all fetched before. Raises ModelError for an invalid id."""
    directory = _cached(model)
    try:
        return directory if directory and weight_files(directory) else None
    except ModelError:
        return None


def _cached(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json")
    except HFValidationError as error:
        raise ModelError("is neither a directory nor a Hugging Face id.") from error
    return Path(config).parent if isinstance(config, str) else None


def _fetch(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The directory in the cache with an id's files that match, of a commit or the newest."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    before = _cached(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise ModelError(
            f"is gated: accept its terms on https://huggingface.co/{model}, and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            "is neither a directory nor a model on Hugging Face that this user may read; check its name, or log in "
            "with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        # Without the Hub, what was fetched before may do.
        if before:
            return before
        raise ModelError(OFFLINE if constants.HF_HUB_OFFLINE else _unfetched(error)) from error
    except Exception as error:
        raise ModelError(_unfetched(error)) from error


def _unfetched(error: Exception) -> str:
    reason = first_line(error).removeprefix("Got: ")
    return f"cannot be fetched ({reason}); check the network and the disk, or give --model a directory."
