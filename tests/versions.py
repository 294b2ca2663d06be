"""Versions derived from the reference, published and registered as a learner would."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from server.store.files.manifest import new_version
from server.store.store import Store

Tensors = dict[str, Any]


def make_version(data_dir: Path, change: Callable[[Tensors], None], *, truncated: bool = False) -> str:
    """Publishes the next version: the reference's weights, changed in place by `change`; `truncated` cuts its file."""
    reference = data_dir / "policies" / "v0000"
    with closing(Store.open(data_dir)) as store:
        version = f"v{len(store.policies.page()):04d}"
        with new_version(data_dir / "policies" / version, kind="full", reference_version="v0000") as new:
            shutil.copytree(reference, new, ignore=lambda *_: {"manifest.json"}, dirs_exist_ok=True)
            tensors = load_file(new / "model.safetensors")
            change(tensors)
            save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
            if truncated:
                os.truncate(new / "model.safetensors", 1_000_000)
        store.policies.register(
            version, kind="full", state="candidate", parent_version="v0000", reference_version="v0000", round_id=None,
            reward_model_version=None, metrics={},
        )  # fmt: skip
    return version


def scaled(factor: float) -> Callable[[Tensors], None]:
    """A change to a model that answers much like the reference: its last norm times a factor."""

    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"] *= factor

    return change
