"""How much memory and disk a model needs, as sums of parts that were measured with SmolLM2-135M.

- Server: a front end, an engine without its model, the weights twice (one to answer, one to swap in), the KV cache.
  3.7 GiB in bfloat16; docs/benchmarks/soak.md has 0.7 + 3.0.
- Concurrent round: its own engine, that engine's weights and the trainer's, its KV cache, and what a micro-batch keeps
  for the backward pass: for each token four times the outputs of all matrices, and four times its logits in float32.
  6.9 GiB in bfloat16; docs/benchmarks/ppo.md has 7.0.
- A version on disk: another copy of all weights, merged for the engine.
"""

from dataclasses import dataclass

from server.doctor.model import ModelShape
from server.shared.machine import GIB
from server.shared.model.dtype import DtypeName

FRONT_END = int(0.7 * GIB)
ENGINE = int(1.5 * GIB)
BYTES: dict[DtypeName, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Needs:
    """Bytes of memory for the server and for a concurrent round, and of disk for one version."""

    server: int
    round: int
    version: int


def needs_of(shape: ModelShape, dtype: DtypeName, kv_cache_gib: int, tokens: int) -> Needs:
    """Needs of a model with up to `tokens` in one pass of the learner."""
    weights = shape.parameters * BYTES[dtype]
    engine = ENGINE + 2 * weights + kv_cache_gib * GIB
    outputs = sum(rows * count for (rows, _), count in shape.matrices.items())
    token = 4 * outputs * BYTES[dtype] + 4 * shape.head[0] * BYTES["float32"]
    return Needs(FRONT_END + engine, engine + tokens * token, weights)
