"""An answer's text up to a stop sequence, the same for server and learner.

The text ends before the sequence, and so do the tokens: what is trained on and scored is what was shown, without an end
token, as if the length limit had come. If a token has both the text's end and the sequence's beginning, it stays.
"""

from collections.abc import Sequence

from server.shared.model.text import TextStream


class StoppingText:
    """Decodes one answer token by token until one of the sequences in `stop` comes. Text that may be the beginning of
    one waits."""

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        self._stream = stream
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._text = ""
        # Characters after each token, and those that were given out.
        self._ends: list[int] = []
        self._given = 0
        self.stopped = False

    @property
    def token_count(self) -> int:
        """Tokens of the text before the sequence, once it came; at least one, since no answer is without tokens."""
        return 1 + next((number for number, end in enumerate(self._ends) if end >= len(self._text)), 0)

    def text(self, token_ids: list[int]) -> str:
        """The text that may be shown after these tokens."""
        if not self._stop:
            return self._stream.text(token_ids)
        for token_id in token_ids:
            if not self.stopped:
                self._add(token_id)
        return self._give(0 if self.stopped else self._waiting())

    def rest(self) -> str:
        """The text that waits, once the answer has ended otherwise."""
        return self._give(0)

    def _add(self, token_id: int) -> None:
        before = len(self._text)
        self._text += self._stream.text([token_id])
        self._ends.append(len(self._text))
        start = max(0, before - self._longest + 1)
        found = [place for sequence in self._stop if (place := self._text.find(sequence, start)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _waiting(self) -> int:
        """How many of the last characters may be the beginning of a sequence."""
        return max(
            length
            for sequence in self._stop
            for length in range(len(sequence))
            if self._text.endswith(sequence[:length])
        )

    def _give(self, waiting: int) -> str:
        end = len(self._text) - waiting
        given, self._given = self._text[self._given : end], end
        return given
