"""How much memory a server and a round need, as sums of parts: one set of formulas for `server doctor` and the learner.

- Server: a front end, an engine without its model, the weights twice (one to answer, one to swap in), the KV cache.
- Round: its own engine with its weights and KV cache; the trainer's weights (with `full`, also the frozen
  reference's); gradients, float32 copies and Adam's moments of what is trained; the critic's features of a rollout;
  and for the tokens of one micro-batch, what is kept for the backward pass and the logits.

Parts were measured (docs/benchmarks/soak.md, memory.md).
"""

from dataclasses import dataclass
from typing import Literal

from server.shared.machine import GIB
from server.shared.model.dtype import DtypeName
from server.shared.model.shape import ModelShape

FRONT_END = int(0.7 * GIB)
ENGINE = int(1.5 * GIB)
# A trainer without its model: what its libraries load and keep when they first compute.
TRAINER = int(0.1 * GIB)
BYTES: dict[DtypeName, int] = {"bfloat16": 2, "float32": 4}
# Most bytes of float32 logits that the learner computes at once: a full micro-batch if there are up to 65,536 words.
LOGIT_BYTES = 2**29
# The same where activations are computed again, since memory is short there.
CHECKPOINTED_LOGIT_BYTES = 2**27
# Tensors of the logits' size at the same time: the logits, their softmax and two gradients.
LOGIT_COPIES = 4
# Numbers kept for the backward pass for each number that a layer's matrices give.
KEPT = 4
# Layers whose states are a critic's features.
FEATURE_LAYERS = 7


@dataclass(frozen=True)
class Training:
    """What a round trains and in what pieces: the most tokens in a micro-batch, and the most of all answers of a
    rollout."""

    train: Literal["lora", "full"]
    lora_rank: int
    tokens: int
    rollout_tokens: int
    checkpoint: bool


@dataclass(frozen=True)
class RoundNeed:
    """Bytes of a round's parts. `trainer` is the weights and what steps them, `rollout` the critic's features."""

    engine: int
    trainer: int
    rollout: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.engine + self.trainer + self.rollout + self.activations + self.logits

    def of_workers(self, count: int, together: bool) -> "RoundNeed":
        """What each of `count` workers needs, which keeps a share of the weights and of what steps them; or, if they
        have one memory `together`, what all do."""
        each = {**vars(self), "trainer": TRAINER + (self.trainer - TRAINER) // count}
        return RoundNeed(**{part: size * (count if together else 1) for part, size in each.items()})


def server_need(shape: ModelShape, dtype: DtypeName, kv_cache_gib: int) -> int:
    """Bytes that a server needs."""
    return FRONT_END + ENGINE + 2 * version_size(shape, dtype) + kv_cache_gib * GIB


def logit_bytes(checkpoint: bool) -> int:
    """The most bytes of float32 logits that the learner computes at once."""
    return CHECKPOINTED_LOGIT_BYTES if checkpoint else LOGIT_BYTES


def version_size(shape: ModelShape, dtype: DtypeName) -> int:
    """Bytes of all weights, in memory or as a merged version on disk."""
    return shape.parameters * BYTES[dtype]


def round_need(shape: ModelShape, dtype: DtypeName, kv_cache_gib: int, training: Training) -> RoundNeed:
    """Bytes that a round needs for its longest micro-batch, beside a server that runs."""
    weights = version_size(shape, dtype)
    return RoundNeed(
        engine=ENGINE + weights + kv_cache_gib * GIB,
        trainer=TRAINER + weights + _trained(shape, dtype, training),
        rollout=training.rollout_tokens * (FEATURE_LAYERS * shape.head[1] + 1) * BYTES["float32"],
        activations=training.tokens * _activations(shape, training.checkpoint) * BYTES[dtype],
        logits=LOGIT_COPIES * min(logit_bytes(training.checkpoint), training.tokens * shape.head[0] * BYTES["float32"]),
    )


def _trained(shape: ModelShape, dtype: DtypeName, training: Training) -> int:
    """Bytes of gradients and Adam's state, and of what is not in the model's weights: adapters, or the reference."""
    if training.train == "full":
        beside, parameters = version_size(shape, dtype), shape.parameters
    else:
        parameters = training.lora_rank * sum((rows + columns) * n for (rows, columns), n in shape.matrices.items())
        beside = parameters * BYTES[dtype]
    # Gradients and two moments; below float32 also gradients and weights of the float32 copies.
    each = 3 * BYTES["float32"] if dtype == "float32" else BYTES[dtype] + 4 * BYTES["float32"]
    return beside + parameters * each


def _activations(shape: ModelShape, checkpoint: bool) -> int:
    """Numbers that are kept for a token: of all layers, or the layers' inputs and one layer that is computed again."""
    if not checkpoint:
        return KEPT * shape.outputs
    return shape.layers * shape.head[1] + KEPT * shape.outputs // max(1, shape.layers)
