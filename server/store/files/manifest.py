"""A version on disk: an immutable directory with a manifest, published by rename.

`new_directory` makes a directory appear whole or not at all: the caller fills a sibling, every file and the folder are
synced, then one rename makes it visible. `verify` refuses a directory without a valid manifest, with a file that is
missing, added or changed, and with any pickle.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.shared.errors import ManifestError
from server.shared.failpoints import failpoint

MANIFEST = "manifest.json"
WEIGHTS_JSON = {"config.json", "model.safetensors.index.json"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


class Manifest(BaseModel):
    """The contents of a version directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = Field(1, description="The layout of this file.")
    version: str = Field(description="The name of the directory, such as v0007.")
    kind: Literal["adapter", "full"] = Field(description="PEFT adapter on the base, or all weights.")
    base_version: str = Field(description="The full version an adapter sits on; a full version names itself.")
    reference_version: str = Field(description="The frozen reference that the KL penalty was taken against.")
    files: dict[str, str] = Field(description="SHA-256 of every other file, by relative path.")
    info: dict[str, Any] = Field(default_factory=dict, description="Where it came from.")


def write_manifest(
    directory: Path,
    *,
    version: str,
    kind: Literal["adapter", "full"],
    base_version: str,
    reference_version: str,
    info: dict[str, Any] | None = None,
) -> Manifest:
    """Write `manifest.json` for the files that are in `directory` now."""
    manifest = Manifest(
        version=version,
        kind=kind,
        base_version=base_version,
        reference_version=reference_version,
        files={name: _sha256(directory / name) for name in _files(directory)},
        info=info or {},
    )
    (directory / MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest, without checking the files' checksums. Raises ManifestError."""
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise ManifestError(f"{directory.name} has no {MANIFEST}, so it is not a published version.") from error
    except (ValidationError, ValueError) as error:
        raise ManifestError(f"{directory.name}/{MANIFEST} is not a valid manifest.") from error


def verify(directory: Path) -> Manifest:
    """The manifest, after checking every file against it. Raises ManifestError with the first difference."""
    if not directory.is_dir():
        raise ManifestError(f"{directory.name} has no directory.")
    manifest = read_manifest(directory)
    if manifest.version != directory.name:
        raise ManifestError(f"{directory.name} has the manifest of {manifest.version}.")
    found = set(_files(directory))
    if missing := sorted(set(manifest.files) - found):
        raise ManifestError(f"{directory.name} lacks {missing[0]}.")
    if added := sorted(found - set(manifest.files)):
        raise ManifestError(f"{directory.name} has {added[0]}, which its manifest does not list.")
    if pickles := sorted(name for name in found if Path(name).suffix in PICKLES):
        raise ManifestError(f"{directory.name} has {pickles[0]}; weights are safetensors only.")
    for name, expected in sorted(manifest.files.items()):
        if _sha256(directory / name) != expected:
            raise ManifestError(f"{directory.name}/{name} does not have the SHA-256 that its manifest lists.")
    return manifest


def manifest_sha256(directory: Path) -> str:
    """The SHA-256 of the manifest, which stands for the whole version."""
    return _sha256(directory / MANIFEST)


def same(directory: Path, sha256: str) -> bool:
    """Whether this directory has the manifest with this SHA-256."""
    return (directory / MANIFEST).exists() and manifest_sha256(directory) == sha256


def made_from(reference: Path) -> str:
    """The model that a reference was made from, as `--model` takes it; the reference's name if that is not known."""
    try:
        return str(read_manifest(reference).info.get("model", reference.name))
    except ManifestError:
        return reference.name


@contextmanager
def new_version(
    final: Path, *, kind: Literal["adapter", "full"], reference_version: str, info: dict[str, Any] | None = None
) -> Iterator[Path]:
    """A `new_directory` that gets a manifest of its files. An adapter's base is the reference."""
    base = reference_version if kind == "adapter" else final.name
    with new_directory(final) as staging:
        yield staging
        write_manifest(
            staging, version=final.name, kind=kind, base_version=base, reference_version=reference_version, info=info
        )


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A sibling of `final` to fill, which becomes `final` at the block's end, whole and durably. An exception leaves
    nothing. Raises FileExistsError if `final` exists already."""
    staging = new_staging(final)
    try:
        yield staging
        publish(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, final: Path) -> None:
    """Rename `staging`, a sibling of `final`, to its final name, durably. Raises FileExistsError."""
    if final.exists():
        raise FileExistsError(f"{final} is already published.")
    for name in [*_files(staging), *([MANIFEST] if (staging / MANIFEST).exists() else [])]:
        sync(staging / name)
    sync(staging)
    failpoint("rename")
    staging.rename(final)
    failpoint("renamed")
    sync(final.parent)


def new_staging(final: Path) -> Path:
    """Create an empty sibling of `final` to fill, after removing those that killed processes left. Each has a unique
    name, so a process that was stopped and continues writes only into its own removed one."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{glob.escape(final.name)}.*partial"):
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a model's directory other than weights and their configuration, unless `target` has them."""
    for name in _files(source):
        copy = target / name
        if not copy.exists() and copy.suffix != ".safetensors" and name not in WEIGHTS_JSON:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, copy)


def _files(directory: Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        failpoint("fsync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
