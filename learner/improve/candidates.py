"""Candidates: weights that an improver saves during training, in the round's directory, by step."""

import shutil
from pathlib import Path


def candidate(directory: Path, step: int) -> Path:
    """The directory of the weights after `step` updates."""
    return directory / f"step-{step:03d}"


def copy_candidate(source: Path, target: Path) -> None:
    """Copies the weights and their configuration. Raises FileNotFoundError if there are none."""
    if not any(source.glob("*.safetensors")):
        raise FileNotFoundError(f"{source.name} has no weights to publish.")
    shutil.copytree(source, target, dirs_exist_ok=True)


def candidates(directory: Path) -> list[int]:
    """The steps whose weights were saved."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


def drop_candidates(directory: Path, after: int) -> None:
    """Deletes the candidates of steps later than `after`."""
    for step in candidates(directory):
        if step > after:
            shutil.rmtree(candidate(directory, step))
