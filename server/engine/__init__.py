"""The serving engine, and vLLM behind it: start, steps, swaps, streams, weights."""
