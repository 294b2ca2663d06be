"""What is counted on the surface of tokens."""

import pytest

from learner.model.surface import surface_table


@pytest.mark.parametrize(
    ("piece", "counts"),
    [
        # Columns: lines, ?, !, ., comma, colon, *, #, dash, `, quote, bracket, digit, capital, word, length, end.
        (" Walk", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 5, 0]),
        ("\n\n- ", [2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 4, 0]),
        ("12.", [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 3, 0]),
        ("?!", [0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]),
        (":**", [0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]),
        ("## ", [0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0]),
        ('"(`', [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 3, 0]),
        (", why", [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0]),
        ("\u3002\uff1f", [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]),
        ("", [0] * 17),
        ("x" * 300, [0] * 15 + [255, 0]),
    ],
)
def test_what_is_counted(piece: str, counts: list[int]) -> None:
    assert surface_table([piece], None).tolist() == [counts]


def test_the_token_that_ends_an_answer_is_marked() -> None:
    assert surface_table(["a", "<end>", "b"], 1)[:, -1].tolist() == [0, 1, 0]
    # The model has no embedding for it.
    assert surface_table(["a", "b"], 2)[:, -1].tolist() == [0, 0]
