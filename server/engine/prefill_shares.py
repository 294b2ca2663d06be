"""How a step's tokens are shared by the prompts that are being read."""


def prefill_share(remaining: list[int], tokens: int) -> int:
    """The most that each prompt may read in a step of so many `tokens`, at least 1: prompts that have less `remaining`
    read to their end, and the others share evenly what is left. A short prompt does not wait for a long one."""
    for place, left in enumerate(sorted(remaining)):
        share = tokens // (len(remaining) - place)
        if left > share:
            return max(share, 1)
        tokens -= left
    return max(remaining, default=1)
