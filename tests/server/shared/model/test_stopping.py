"""Where an answer ends that a stop sequence ends: its text, its tokens, and what is shown meanwhile."""

from typing import Any

import pytest

from server.shared.model.stopping import StoppingText

PIECES = ["The ", "end", ".\n", "\nUser", ": hi", ""]


class Pieces:
    """Decodes token N as the Nth of PIECES."""

    def text(self, token_ids: list[int]) -> str:
        return "".join(PIECES[number] for number in token_ids)


def stopping(*stop: str) -> StoppingText:
    stream: Any = Pieces()
    return StoppingText(stream, stop)


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        # At the beginning of a token, within one, and across two.
        (["\nUser"], "The end.\n", 3),
        (["nd"], "The e", 2),
        (["\n\n"], "The end.", 3),
        # The first one that comes, not the first that is named.
        ([": hi", "end"], "The ", 1),
        # Of two that come with one token, the one that begins first.
        (["n", "end"], "The ", 1),
        # At the very beginning: an answer without tokens cannot be trained on.
        (["The"], "", 1),
    ],
)
def test_an_answer_ends_before_the_sequence(stop: list[str], text: str, tokens: int) -> None:
    for together in (True, False):
        answer = stopping(*stop)
        parts = [[0, 1, 2, 3, 4]] if together else [[number] for number in range(5)]
        assert "".join(answer.text(part) for part in parts) + answer.rest() == text
        assert (answer.stopped, answer.token_count) == (True, tokens)


def test_what_may_be_the_beginning_of_a_sequence_waits() -> None:
    answer = stopping("end.\n\nBot", "\n\nUser:")
    assert [answer.text([number]) for number in range(5)] == ["The ", "", "", "end.", ""]
    assert (answer.stopped, answer.token_count) == (True, 3)
    answer = stopping("end.\n\nBot")
    assert [answer.text([number]) for number in range(3)] == ["The ", "", ""]
    # The answer ends otherwise.
    assert (answer.rest(), answer.rest(), answer.stopped) == ("end.\n", "", False)


def test_without_sequences_nothing_waits() -> None:
    answer = stopping()
    assert [answer.text([0, 1]), answer.text([5]), answer.text([2]), answer.rest()] == ["The end", "", ".\n", ""]
    assert answer.stopped is False
