"""How a step's tokens are shared among waiting prompts."""

import pytest

from server.engine.prefill_shares import prefill_share


@pytest.mark.parametrize(
    ("remaining", "tokens", "expected"),
    [
        ([], 252, 1),
        ([40], 252, 40),
        ([1600], 252, 252),
        ([1600, 1600], 252, 126),
        # The short one is read whole; the long ones share the rest.
        ([1600, 1600, 1600, 40], 252, 70),
        ([40, 1600], 252, 212),
        ([60, 60, 60, 60], 252, 60),
        ([64] * 16, 252, 15),
        ([64] * 16, 1400, 64),
        # Answers took all tokens: each prompt still gets one.
        ([1600, 40], 0, 1),
        ([1600, 40], -3, 1),
    ],
)
def test_short_prompts_are_read_to_their_end_and_long_ones_share_the_rest(
    remaining: list[int], tokens: int, expected: int
) -> None:
    assert prefill_share(remaining, tokens) == expected
