"""How far a round may go from the reference."""

import pytest

from learner.improve.budget import Budget
from learner.improve_settings import PolicySettings


@pytest.mark.parametrize(
    ("incumbent_kl", "kl", "moved"),
    [
        # The reference serves, or an estimate of next to nothing that came out below it.
        (0.0, 6.0, 0.0),
        (-0.1, 6.0, 0.0),
        (3.0, 9.0, 3.0),
        # Not beyond the total.
        (6.0, 12.0, 6.0),
        (11.0, 12.0, 6.0),
    ],
)
def test_the_budget_moves_with_the_version_that_serves(incumbent_kl: float, kl: float, moved: float) -> None:
    settings = PolicySettings(kl_budget=6.0, kl_total=12.0)
    assert Budget.after(incumbent_kl, settings) == Budget(kl, moved, 0.5)


def test_a_budget_above_the_total_does_not_move() -> None:
    assert Budget.after(3.0, PolicySettings(kl_budget=100.0, kl_total=12.0)) == Budget(100.0, 0.0, 0.5)


def test_short_answers_have_a_budget_per_token() -> None:
    budget = Budget(6.0, per_token=0.25)
    assert [budget.of(length) for length in (1, 8, 24, 25, 512)] == [0.25, 2.0, 6.0, 6.0, 6.0]
    assert Budget(6.0).of(1) == 6.0
