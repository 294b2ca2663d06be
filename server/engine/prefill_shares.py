"""How a step's tokens are shared among the prompts that are being read."""


def prefill_share(remaining: list[int], tokens: int) -> int:
    """The most tokens that each prompt may read in a step of `tokens`, at least 1. Prompts with fewer `remaining` read
    to their end, and the others share the rest evenly. A short prompt does not wait for a long one."""
    for place, left in enumerate(sorted(remaining)):
        share = tokens // (len(remaining) - place)
        if left > share:
            return max(share, 1)
        tokens -= left
    return max(remaining, default=1)
