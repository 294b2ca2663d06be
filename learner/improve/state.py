"""What training needs to resume as if it had not been killed: weights, Adam's moments, and metrics of the steps so far.

Everything else follows from these: draws from the seed and the step's number, kl_coef from the metrics. A state is a
directory `state-NNN` of safetensors and JSON. One rename makes the complete directory visible; the state before it is
deleted afterwards.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from learner.improve.adam import Adam
from learner.improve.candidates import drop_candidates
from server.store.files.manifest import new_directory

TENSORS, FIGURES = "optimizer.safetensors", "figures.json"
# The digest of what the states of a round were trained on.
DIGEST = "votes.sha256"


def save_state(directory: Path, figures: list[dict[str, Any]], optimizer: Adam) -> None:
    """Writes the state after `len(figures)` steps."""
    final = directory / f"state-{len(figures):03d}"
    # It already exists if a suspended learner woke up and got this far; it computed the same.
    if not final.exists():
        with new_directory(final) as staging:
            save_file(optimizer.state(), staging / TENSORS)
            (staging / FIGURES).write_text(json.dumps(figures), encoding="utf-8")
    drop_states(directory, but=final)


def load_state(directory: Path, optimizer: Adam) -> list[dict[str, Any]]:
    """Restores the weights and moments of the last state and returns its metrics; [] if there is none."""
    states = sorted(directory.glob("state-*"))
    if not states:
        return []
    optimizer.load(load_file(states[-1] / TENSORS))
    figures: list[dict[str, Any]] = json.loads((states[-1] / FIGURES).read_text(encoding="utf-8"))
    return figures


def drop_states(directory: Path, but: Path | None = None) -> None:
    """Deletes all states except `but`, including partial ones from a killed process."""
    for path in (*directory.glob("state-*"), *directory.glob(".state-*.partial")):
        if path != but:
            shutil.rmtree(path)


def start_over_unless(digest: str, directory: Path) -> None:
    """Drops what was trained on other votes or examples than those of this digest: a deletion may have taken some since
    the round was killed, and their numbers would be others' now."""
    file = directory / DIGEST
    if file.exists() and file.read_text(encoding="utf-8") != digest:
        drop_states(directory)
        drop_candidates(directory, after=0)
    file.write_text(digest, encoding="utf-8")
