"""Writes the table of fields in docs/gateway.md from the code. `make docs` runs it."""

import sys
from pathlib import Path

from clients.gateway.fields import NEUTRAL, NEUTRAL_IN_MESSAGES, NEUTRAL_IN_STREAM_OPTIONS, SERVED

PAGE = Path(__file__).with_name("gateway.md")
BEGIN, END = "<!-- fields -->\n", "<!-- /fields -->\n"


def table() -> str:
    """What is served, and which values of other fields change nothing."""
    rows = [f"| `{name}` | {words} |" for name, words in SERVED.items()]
    neutral = {
        **NEUTRAL,
        **{f"messages[].{name}": one for name, one in NEUTRAL_IN_MESSAGES.items()},
        **{f"stream_options.{name}": one for name, one in NEUTRAL_IN_STREAM_OPTIONS.items()},
    }
    rows += [f"| `{name}` | accepted without effect: {one.words} |" for name, one in neutral.items()]
    rows.append("| any other | refused |")
    return "\n".join(["| field | |", "| --- | --- |", *rows]) + "\n"


def written(page: str) -> str:
    """The page with the table replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(written(PAGE.read_text()))
