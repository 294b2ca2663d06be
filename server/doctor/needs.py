"""What a model needs of memory and disk, as sums of parts that were measured with SmolLM2-135M.

- Server: a front end, an engine without its model, the weights twice (one to answer, one to swap in), the KV cache.
  3.7 GiB in bfloat16; docs/benchmarks/soak.md has 0.7 + 3.0.
- Round beside it: an engine of its own, its weights and the trainer's, its KV cache, and what a micro-batch keeps for
  the backward pass: for each token the outputs of all matrices, four times over, and its logits, four times in
  float32. 6.9 GiB in bfloat16; docs/benchmarks/ppo.md has 7.0.
- A version on disk: all weights once more, merged for the engine.
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
    """Bytes: of memory for the server and for a round beside it, of disk for one version."""

    server: int
    round: int
    version: int


def needs_of(shape: ModelShape, dtype: DtypeName, kv_cache_gib: int, tokens: int) -> Needs:
    """Of a model with up to `tokens` in one pass of the learner's."""
    weights = shape.parameters * BYTES[dtype]
    engine = ENGINE + 2 * weights + kv_cache_gib * GIB
    outputs = sum(rows * count for (rows, _), count in shape.matrices.items())
    token = 4 * outputs * BYTES[dtype] + 4 * shape.head[0] * BYTES["float32"]
    return Needs(FRONT_END + engine, engine + tokens * token, weights)
