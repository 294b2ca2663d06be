"""Tail probabilities against numbers worked out by hand."""

import pytest

from learner.reward.exact_tests import at_least, at_most, either_side, holm


def test_tails_of_a_fair_coin() -> None:
    assert (at_most(1, 4), at_most(0, 3), at_most(3, 3), at_most(-1, 3), at_most(0, 0)) == (5 / 16, 1 / 8, 1, 0, 1)
    # One half, and half of P(X = 500).
    assert at_most(500, 1000) == pytest.approx(0.5 + 0.02522501817836 / 2, abs=1e-12)
    assert at_most(3, 20_000) == 0.0


def test_either_side_counts_both_tails_once() -> None:
    assert (either_side(0, 4), either_side(4, 4), either_side(2, 4), either_side(0, 0)) == (1 / 8, 1 / 8, 1, 1)


def test_tails_of_a_poisson_count() -> None:
    # 1 - (1 + 1 + 1/2) / e.
    assert at_least(3, 1.0) == pytest.approx(0.0803014, abs=1e-7)
    assert at_least(0, 4.0) == pytest.approx(1.0)
    # In the far tail, where one minus the rest would be zero: hardly more than its first term, 4^60 / 60! / e^4.
    assert at_least(60, 4.0) == pytest.approx(4.0**60 * 0.01831564 / 8.320987e81 * 1.0701, rel=1e-3)


def test_p_values_are_corrected_for_their_number() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    # A test that was not made costs nothing.
    assert holm([None, 0.01, None, 0.04]) == pytest.approx([1, 0.02, 1, 0.04])
