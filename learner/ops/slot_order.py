"""Tests whether it is random which answer of a comparison is in slot A. No torch: `learner status` runs it each time.

If it is not random, a voter's habit of naming the first answer would be learned as a preference: for hotter answers,
for the newer version, or for the reward model's choice.
"""

from collections.abc import Iterator

from learner.reward.exact_tests import either_side, holm

# Tested again by every `learner status`, so stricter than the 5 % of a test that is made once.
LEVEL = 0.001
KINDS = {"hotter": "the hotter answer", "newer": "the newer version's answer", "chosen": "the reward model's choice"}


def order_warnings(slot_order: dict[str, tuple[int, int]]) -> Iterator[str]:
    """A sentence for each kind of answer that is in A more or less often than a fair coin would put it there;
    `slot_order` has how often it was, and in how many comparisons."""
    p_values = holm([either_side(*counts) if counts[1] else None for counts in slot_order.values()])
    for (kind, (in_a, comparisons)), p_value in zip(slot_order.items(), p_values, strict=True):
        if p_value < LEVEL:
            yield (
                f"The order of answers is not random: {KINDS[kind]} was A in {in_a} of {comparisons} comparisons "
                f"(p = {p_value:.1g})."
            )
