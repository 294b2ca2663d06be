"""What training needs to resume as if it had not been killed: weights, Adam's moments, and metrics of the steps so far.

Everything else follows from these: draws from the seed and the step's number, kl_coef from the metrics. A state is a
directory `state-NNN` of a checkpoint (`torch.distributed.checkpoint`) and JSON: any number of workers resumes from what
any number has written. One rename makes the complete directory visible; the state before it is deleted afterwards.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from learner.improve.adam import Adam
from learner.improve.candidates import drop_candidates
from server.store.files.manifest import new_directory

OPTIMIZER, FIGURES = "optimizer", "figures.json"
# What a commit before workers wrote in place of a checkpoint.
TENSORS = "optimizer.safetensors"
# The digest of what the states of a round were trained on.
DIGEST = "votes.sha256"


def save_state(directory: Path, figures: list[dict[str, Any]], optimizer: Adam) -> None:
    """Writes the state after `len(figures)` steps; each of the optimizer's workers its share."""
    workers, final = optimizer.workers, directory / f"state-{len(figures):03d}"
    # It already exists if a suspended learner woke up and got this far; it computed the same.
    if not workers.leaders(final.exists()):
        with new_directory(final) if workers.leads else nullcontext() as mine:
            staging = workers.leaders(mine)
            assert staging
            save(optimizer.state(), checkpoint_id=staging / OPTIMIZER, no_dist=workers.count == 1)
            if workers.leads:
                (staging / FIGURES).write_text(json.dumps(figures), encoding="utf-8")
    if workers.leads:
        drop_states(directory, but=final)


def load_state(directory: Path, optimizer: Adam) -> list[dict[str, Any]]:
    """Restores the weights and moments of the last state and returns its metrics; [] if there is none."""
    workers = optimizer.workers
    last = workers.leaders(max(directory.glob("state-*"), default=None))
    if last is None:
        return []
    if (last / TENSORS).exists():
        optimizer.load(load_file(last / TENSORS))
    else:
        # A parameter that never had a gradient has no moments.
        written = FileSystemReader(last / OPTIMIZER).read_metadata().state_dict_metadata
        state = {name: tensor for name, tensor in optimizer.blank_state().items() if name in written}
        load(state, checkpoint_id=last / OPTIMIZER, no_dist=workers.count == 1)
        optimizer.load(state)
    figures: list[dict[str, Any]] = json.loads((last / FIGURES).read_text(encoding="utf-8"))
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
