"""Versions on disk: written to a sibling, manifest last, made visible by one rename; verified before they are read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from server.shared.errors import ManifestError
from server.store.files.manifest import Manifest, new_staging, publish, verify, write_manifest

WEIGHT_FILES = ("*.safetensors", "*.json")


def publish_version(
    final: Path,
    fill: Callable[[Path], None],
    *,
    kind: Literal["adapter", "full"],
    reference_version: str,
    info: dict[str, Any],
) -> Manifest:
    """Makes the directory `final` from what `fill` writes. An equal one that is already there, from a round that was
    killed after the rename, is kept: versions never change."""
    if final.exists():
        return verify(final)
    staging = new_staging(final)
    fill(staging)
    base = reference_version if kind == "adapter" else final.name
    write_manifest(
        staging, version=final.name, kind=kind, base_version=base, reference_version=reference_version, info=info
    )
    publish(staging, final)
    return verify(final)


def copy_weights(source: Path) -> Callable[[Path], None]:
    """A `fill` that takes the weights and configuration in `source`. It raises FileNotFoundError without weights."""

    def fill(staging: Path) -> None:
        if not any(source.glob("*.safetensors")):
            raise FileNotFoundError(f"{source.name} has no weights to publish.")
        for pattern in WEIGHT_FILES:
            for path in sorted(source.glob(pattern)):
                if path.name != "manifest.json":
                    shutil.copy2(path, staging / path.name)

    return fill


def with_tokenizer(fill: Callable[[Path], None], reference: Path) -> Callable[[Path], None]:
    """A `fill` that adds the reference's tokenizer: a full version must be servable by itself."""

    def both(staging: Path) -> None:
        fill(staging)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (reference / name).exists() and not (staging / name).exists():
                shutil.copy2(reference / name, staging / name)

    return both


def verified(directory: Path) -> tuple[Path, Manifest]:
    """The directory and its manifest. Raises ManifestError."""
    if not directory.is_dir():
        raise ManifestError(f"{directory.name} has no directory.")
    return directory, verify(directory)
