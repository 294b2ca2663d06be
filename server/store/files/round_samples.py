"""Answers to held-out prompts in a judged round, read from the round's ANSWERS file to be shown.

The file names conversations and is swept after deletions (`server.store.files.residue`). Between a deletion and the
sweep it still has deleted content, so callers must check in the store, after reading, which conversations still exist.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.store.files.residue import ANSWERS, LINE
from server.store.learning.records import Round


@dataclass(frozen=True)
class RoundSample:
    """One answer to a held-out prompt by the incumbent, and by the candidate that was judged."""

    # Its row in the file as the round wrote it, in growing order.
    row: int
    # Empty: one of the project's own prompts.
    conversation_id: str
    prompt: str
    before: str
    after: str


def read_samples(data_dir: Path, round_: Round) -> Iterator[RoundSample]:
    """Yield the round's samples; none if the round judged nothing. Call it inside `keeping`."""
    path = data_dir / "rounds" / round_.id / ANSWERS
    if round_.metrics.gate is None or not path.exists():
        return
    chosen = f"step {round_.metrics.gate.chosen.step}"
    # Read bytes: text lines would also end at U+2028, which JSON may hold. A line cut short by a kill has no newline.
    for number, data in enumerate(path.read_bytes().splitlines(keepends=True)):
        if LINE.match(data) and data.endswith(b"\n"):
            line: dict[str, Any] = json.loads(data)
            yield RoundSample(
                line.get("row", number),
                line["conversation_id"],
                line["prompt"],
                line["incumbent"]["text"],
                line[chosen]["text"],
            )
