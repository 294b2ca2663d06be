"""Support for seeded answers whose prompts are read in parts, in vLLM on a CPU.

vLLM samples in every step, also after part of a prompt, then discards the token and rewinds the answer's generator. A
generator on a CPU cannot be rewound, and the engine dies with "CPU Generator does not use offset" (seen in 0.32). So
such a row is sampled without its generator, which then keeps its state.
"""

from functools import wraps
from typing import Any


def keep_seeds(runner: Any) -> None:
    """Patch vLLM's model runner so that discarded tokens spend no seed. Call it once, before any request."""
    # vLLM's newer runner, so far for GPUs only, does not use such generators.
    if runner.device.type != "cpu" or not hasattr(runner, "discard_request_mask"):
        return
    sample = runner.sample_tokens

    @wraps(sample)
    def sample_tokens(*arguments: Any, **named: Any) -> Any:
        batch = runner.input_batch
        partly_read = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        kept = {row: batch.generators.pop(row) for row in partly_read if row in batch.generators}
        try:
            return sample(*arguments, **named)
        finally:
            batch.generators.update(kept)

    runner.sample_tokens = sample_tokens
