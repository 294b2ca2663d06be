"""What PPO needs to go on as if it had not been killed: weights, Adam's moments, and the figures of the steps so far.

Everything else follows from these: draws from the seed and the step's number, kl_coef from the figures. A state is a
directory `state-NNN`, safetensors and JSON, that appears whole by one rename; the one before it is removed after.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from learner.improve.ppo.adam import Adam
from server.store.files.manifest import new_directory

TENSORS, FIGURES = "optimizer.safetensors", "figures.json"


def save_state(directory: Path, figures: list[dict[str, Any]], optimizer: Adam) -> None:
    """Writes the state after `len(figures)` steps."""
    final = directory / f"state-{len(figures):03d}"
    # There already where a learner that was stopped woke and went on to here: it computed the same.
    if not final.exists():
        with new_directory(final) as staging:
            save_file(optimizer.state(), staging / TENSORS)
            (staging / FIGURES).write_text(json.dumps(figures), encoding="utf-8")
    drop_states(directory, but=final)


def load_state(directory: Path, optimizer: Adam) -> list[dict[str, Any]]:
    """The figures of the last state, its weights and moments put back; [] where there is none."""
    states = sorted(directory.glob("state-*"))
    if not states:
        return []
    optimizer.load(load_file(states[-1] / TENSORS))
    figures: list[dict[str, Any]] = json.loads((states[-1] / FIGURES).read_text(encoding="utf-8"))
    return figures


def drop_states(directory: Path, but: Path | None = None) -> None:
    """Removes states, whole ones and what a killed process left."""
    for path in (*directory.glob("state-*"), *directory.glob(".state-*.partial")):
        if path != but:
            shutil.rmtree(path)
