"""Text from users and models on a terminal: it must not move the cursor, retitle the window or disguise itself."""

import re

# All control characters except line feed and tab (C0, DEL, C1), and the marks that change the writing direction.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without control characters."""
    return CONTROLS.sub("", text)
