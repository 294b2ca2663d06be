"""The serving engine over vLLM: start, steps, swaps, streams and weights."""
