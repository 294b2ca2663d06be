"""Model output on a terminal, without control sequences and wrapped between words."""

import re
from collections.abc import Callable

from rich.cells import cell_len

# All control characters except line feed and tab (C0, DEL, C1), and the marks that change the writing direction: text
# from a model must not move the cursor, retitle the window or disguise its content.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without control characters, and with tabs as four spaces."""
    return CONTROLS.sub("", text).replace("\t", "    ")


class WordWrap:
    """Streams text to `write` in lines of at most `width` cells, broken between words.

    A word is held back until it ends, or until it fills half a line (a long address, or a language without spaces).
    """

    def __init__(self, write: Callable[[str], object], width: int) -> None:
        self._write = write
        self._width = width
        self._column = 0
        self._spaces = ""
        self._word = ""

    def feed(self, text: str) -> None:
        """Adds the next piece of the stream."""
        for character in printable(text):
            if not character.isspace():
                self._word += character
                if cell_len(self._word) * 2 >= self._width:
                    self._put_word()
                continue
            self._put_word()
            if character == "\n":
                self._new_line()
            else:
                self._spaces += character

    def close(self) -> None:
        """Writes what is held back and ends the line."""
        self._put_word()
        if self._column:
            self._new_line()

    def _put_word(self) -> None:
        if not self._word:
            return
        cells = cell_len(self._spaces + self._word)
        if self._column and self._column + cells > self._width:
            self._new_line()
            cells = cell_len(self._word)
        self._write(self._spaces + self._word)
        self._column += cells
        self._spaces = self._word = ""

    def _new_line(self) -> None:
        self._write("\n")
        self._column = 0
        self._spaces = ""
