"""Prepares the weights of a version for an engine.

A full version is served as it is. An adapter is merged into its base in the engine's dtype and saved under
`merged/<dtype>/`, again whenever that is missing; an engine that serves adapters loads it as it is.
`check_weights` only compares headers, so it takes milliseconds.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from server.shared.errors import ManifestError
from server.shared.model.dtype import DtypeName, torch_dtype
from server.shared.model.merged import load_adapted, merged_weights
from server.shared.model.shape import tensor_shapes
from server.store.files.manifest import copy_tokenizer, new_version, verify

if TYPE_CHECKING:
    import torch

# Has a folder per dtype; the first releases put versions directly into it, in bfloat16.
MERGED = "merged"


def engine_weights(data_dir: Path, version: str, dtype: DtypeName, trust_remote_code: bool = False) -> Path:
    """A Hugging Face directory with the full weights of `version`, verified, for an engine that computes in `dtype`.
    Raises ManifestError."""
    directory = data_dir / "policies" / version
    manifest = verify(directory)
    base = data_dir / "policies" / manifest.base_version
    if manifest.kind == "full":
        return check_weights(directory, data_dir / "policies" / manifest.reference_version)
    merged = data_dir / MERGED / dtype / version
    try:
        verify(merged)
    except ManifestError:
        _merge(base, directory, merged, dtype, trust_remote_code)
    return check_weights(merged, base)


def adapter_weights(data_dir: Path, version: str) -> Path:
    """The directory of an adapter, or of a reference, verified. Raises ManifestError."""
    directory = data_dir / "policies" / version
    manifest = verify(directory)
    if manifest.kind == "full" and manifest.reference_version != version:
        raise ManifestError(f"{version} has full weights, but this server serves adapters (PREFLOOP_SERVE_ADAPTERS).")
    return directory


def finite_tensors(directory: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield every tensor in `directory` with its name. Raises ValueError for one with a value that is not finite."""
    import torch

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{name} has values that are not finite")
                yield name, tensor


def check_weights(directory: Path, like: Path) -> Path:
    """`directory`, if its tensors have the names and shapes of those in `like`. Raises ManifestError."""
    found, expected = tensor_shapes(directory), tensor_shapes(like)
    if missing := sorted(expected.keys() - found.keys()):
        raise ManifestError(f"{directory.name} lacks the tensor {missing[0]}.")
    if added := sorted(found.keys() - expected.keys()):
        raise ManifestError(f"{directory.name} has the tensor {added[0]}, which the engine does not expect.")
    for name, shape in sorted(found.items()):
        if shape != expected[name]:
            raise ManifestError(f"{directory.name}: {name} has shape {shape}, but the engine needs {expected[name]}.")
    return directory


def _merge(base: Path, adapter: Path, final: Path, dtype: DtypeName, trust_remote_code: bool) -> None:
    verify(base)
    for stale in (final, final.parent.parent / final.name):
        shutil.rmtree(stale, ignore_errors=True)
    with new_version(final, kind="full", reference_version=base.name) as staging:
        model = load_adapted(base, adapter, torch_dtype(dtype), trust_remote_code)
        model.get_base_model().save_pretrained(staging, state_dict=dict(merged_weights(model)))
        copy_tokenizer(base, staging)
