"""The surface of tokens: what a reader sees before reading, such as line breaks, list marks, digits, ends of sentences.

A model's hidden states know these, too, among thousands of other things; beside them, few votes are enough to learn a
taste for short sentences or lists. Counts are per token, so that a mean over an answer's tokens is a rate, and a head
on it gives each token a score, like one on hidden states.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# What is counted in a token's text, in the scripts that have a sign of their own for it.
COUNTED: tuple[Callable[[str], int], ...] = (
    lambda text: text.count("\n"),
    lambda text: sum(map(text.count, "?？؟")),
    lambda text: sum(map(text.count, "!！")),
    lambda text: sum(map(text.count, ".。．।")),
    lambda text: sum(map(text.count, ",，、،")),
    lambda text: sum(map(text.count, ":;：；؛")),
    lambda text: text.count("*"),
    lambda text: text.count("#"),
    lambda text: sum(map(text.count, "-–—•")),
    lambda text: text.count("`"),
    lambda text: sum(map(text.count, '"“”«»')),
    lambda text: sum(map(text.count, "()（）")),
    lambda text: sum(map(str.isdigit, text)),
    lambda text: sum(map(str.isupper, text)),
    # A word begins.
    lambda text: int(text[:1].isspace() and text[1:2].isalnum()),
    len,
)
MOST = 255


def surface_table(pieces: Sequence[str], end: int | None) -> Tensor:
    """(V, S) uint8 counts for each token of a vocabulary, from the text of each, (V,) `pieces`; the last column is 1
    for the token that ends an answer, if there is one."""
    rows = [[*(min(count(text), MOST) for count in COUNTED), token == end] for token, text in enumerate(pieces)]
    return torch.tensor(rows, dtype=torch.uint8)
