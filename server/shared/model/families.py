"""Model families that cannot be served, or cannot learn, and why.

Tried with a tiny model of each family (docs/models.md). A family that was not tried is compared with the trainer at the
start of every round.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.shared.model.dtype import engine_is_for_cpus

Limited = Literal["serving", "learning", "full"]


@dataclass(frozen=True)
class Limit:
    """`lost`: what does not work, and all after it in `Limited`'s order. `reason`: a clause."""

    lost: Limited
    reason: str
    cpu_only: bool = False


# By transformers' `model_type`.
LIMITS: dict[str, Limit] = {}


def limit_of(directory: Path) -> Limit | None:
    """The limit of the model in a Hugging Face directory on this machine; None if its family has none that is known."""
    limit = LIMITS.get(family_of(directory))
    return None if limit and limit.cpu_only and not engine_is_for_cpus() else limit


def family_of(directory: Path) -> str:
    """The model's `model_type`, an empty string if it has none."""
    return str(json.loads((directory / "config.json").read_bytes()).get("model_type", ""))


def lost(limit: Limit | None, wanted: Limited) -> bool:
    """Whether the limit rules out what is wanted."""
    order: list[Limited] = ["serving", "learning", "full"]
    return limit is not None and order.index(limit.lost) <= order.index(wanted)
