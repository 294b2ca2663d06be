"""Candidates: the weights that an improver keeps along the way, in a round's directory, by the step that made them."""

import shutil
from pathlib import Path


def candidate(directory: Path, step: int) -> Path:
    """Where the weights after `step` updates are."""
    return directory / f"step-{step:03d}"


def copy_candidate(source: Path, target: Path) -> None:
    """Copies the weights and their configuration. Raises FileNotFoundError where there are none."""
    if not any(source.glob("*.safetensors")):
        raise FileNotFoundError(f"{source.name} has no weights to publish.")
    shutil.copytree(source, target, dirs_exist_ok=True)


def candidates(directory: Path) -> list[int]:
    """The steps whose weights were kept."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


def drop_candidates(directory: Path, after: int) -> None:
    """Removes the candidates of later steps than `after`."""
    for step in candidates(directory):
        if step > after:
            shutil.rmtree(candidate(directory, step))
