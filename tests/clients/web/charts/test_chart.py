"""Positions in the chart, as literal numbers: x from 44 to 264, y from 128 (low) to 8 (high)."""

import pytest

from clients.web.charts.chart import axis, curve, intervals, nice, stacks


@pytest.mark.parametrize(
    ("value", "step"), [(0.03, 0.05), (0.05, 0.05), (0.11, 0.2), (1, 1), (1.2, 2), (3, 5), (7, 10), (40, 50)]
)
def test_steps_are_round(value: float, step: float) -> None:
    assert nice(value) == pytest.approx(step)


@pytest.mark.parametrize(
    ("values", "zero", "ticks"),
    [
        ([1, 9], True, [0, 5, 10]),
        ([0, 100], True, [0, 50, 100]),
        ([-0.2, 1.9], False, [-1, 0, 1, 2]),
        ([61.0, 62.9], False, [61, 61.5, 62, 62.5, 63]),
        ([5.0, 5.0], False, [5, 5.5]),
        ([], True, [0, 0.5]),
    ],
)
def test_an_axis_holds_its_values_between_round_ends(values: list[float], zero: bool, ticks: list[float]) -> None:
    made = axis(values, 0, 100, zero=zero)
    assert made.ticks == pytest.approx(ticks)
    assert made.at(made.low) == 0
    assert made.at(made.high) == 100


def test_counts_have_whole_steps() -> None:
    assert axis([2.0], 0, 100, least=1).ticks == [0, 1, 2]


def test_a_curve_with_its_spread_and_its_mark() -> None:
    chart = curve("KL", "nats", [0, 1, 2], [0.0, 1.0, 4.0], spread=[0.0, 1.0, 0.0], mark=1)
    assert chart.y.ticks == [0, 1, 2, 3, 4]
    assert chart.line == [(44, 128), (154, 98), (264, 8)]
    assert chart.band == [(44, 128), (154, 68), (264, 8), (264, 8), (154, 128), (44, 128)]
    assert chart.mark == 154
    assert chart.x_labels == [(44, "0"), (154, "1"), (264, "2")]


def test_values_to_compare_with_are_in_the_picture() -> None:
    chart = curve("KL", "nats", [0, 1], [0.0, 1.0], levels=[(2.0, "target"), (4.0, "budget")])
    assert chart.line == [(44, 128), (264, 98)]
    assert chart.levels == [(68, "target"), (8, "budget")]


def test_a_curve_of_one_step_and_without_spread() -> None:
    chart = curve("KL", "nats", [0], [0.0])
    assert chart.line == [(44, 128)]
    assert chart.band == ()
    assert chart.mark is None


def test_intervals_stand_in_the_middle_of_their_places() -> None:
    chart = intervals(
        "Win rate", "share", "round", [("a", 0.5, 0.25, 1.0, True), ("b", 0.0, 0.0, 0.5, False)], level=(0.5, "even")
    )
    assert [(dot.x, dot.y, dot.low, dot.high, dot.filled) for dot in chart.dots] == [
        (99, 68, 98, 8, True),
        (209, 128, 128, 68, False),
    ]
    assert chart.dots[0].label == "a: 0.50 [0.25, 1.00]"
    assert chart.levels == [(68, "even")]


def test_bars_stand_one_upon_the_other() -> None:
    chart = stacks("Votes", "votes", "day", ["choices", "thumbs"], [("mon", [3, 1]), ("tue", [0, 0])])
    assert [(bar.kind, bar.x, bar.y, bar.width, bar.height) for bar in chart.bars] == [
        (0, 55, 38, 88, 90),
        (1, 55, 8, 88, 30),
    ]
    assert [bar.label for bar in chart.bars] == ["mon: 3 choices", "mon: 1 thumbs"]


def test_many_names_are_thinned_and_the_last_one_stays() -> None:
    chart = stacks("Votes", "votes", "day", ["x"], [(str(day), [1]) for day in range(30)])
    assert [name for _, name in chart.x_labels] == ["5", "13", "21", "29"]
