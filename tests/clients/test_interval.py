import pytest

from clients.interval import wilson


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [
        # Solutions of |share - p| = z sqrt(p (1 - p) / n), to six places.
        (8, 10, 0.490162, 0.943318),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (32.5, 64, 0.388405, 0.626335),
    ],
)
def test_wilsons_interval(wins: float, n: int, low: float, high: float) -> None:
    assert wilson(wins, n) == pytest.approx((low, high), abs=2e-6)


def test_nothing_compared_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)
