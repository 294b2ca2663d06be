"""A biased order of answers is detected, a random one is not."""

import random

from learner.ops.slot_order import order_warnings


def test_a_biased_order_is_named_and_a_random_one_is_not() -> None:
    assert list(order_warnings({"hotter": (512, 1000), "newer": (9, 20), "chosen": (0, 0)})) == []
    [warning] = order_warnings({"hotter": (512, 1000), "newer": (0, 20), "chosen": (0, 0)})
    # Two tests, two sides, 2^20 ways.
    assert warning == (
        "The order of answers is not random: the newer version's answer was A in 0 of 20 comparisons (p = 4e-06)."
    )
    # Too many in A, as well.
    assert "the hotter answer was A in 600 of 1000" in next(iter(order_warnings({"hotter": (600, 1000)})))


def test_few_comparisons_prove_nothing() -> None:
    # 2 / 2^10 is above the level.
    assert list(order_warnings({"chosen": (10, 10)})) == []
    assert len(list(order_warnings({"chosen": (11, 11)}))) == 1


def test_a_fair_order_is_hardly_ever_accused() -> None:
    chance = random.Random(0)
    accused = 0
    for _ in range(500):
        accused += bool(list(order_warnings({"hotter": (sum(chance.random() < 0.5 for _ in range(200)), 200)})))
    assert accused <= 2
