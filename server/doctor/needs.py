"""How much memory and disk the model to serve needs."""

from dataclasses import dataclass, replace
from typing import Literal

from server.shared.model.dtype import DtypeName
from server.shared.model.needs import Training, round_need, server_need, version_size
from server.shared.model.shape import ModelShape


@dataclass(frozen=True)
class Needs:
    """Bytes of memory for the server and for a concurrent round, and of disk for one version. `least_round` is what a
    round needs that saves memory, as it does with `policy.checkpoint_activations` where memory is short."""

    server: int
    round: int
    least_round: int
    version: int


def needs_of(
    shape: ModelShape,
    dtype: DtypeName,
    kv_cache_gib: int,
    training: Training,
    checkpoint: Literal["auto", "on", "off"] = "auto",
) -> Needs:
    """Needs of a model, whatever `training` says about checkpoints."""
    kept, least = (
        round_need(shape, dtype, kv_cache_gib, replace(training, checkpoint=again)).total for again in (False, True)
    )
    return Needs(
        server=server_need(shape, dtype, kv_cache_gib),
        round=least if checkpoint == "on" else kept,
        least_round=kept if checkpoint == "off" else least,
        version=version_size(shape, dtype),
    )
