"""What workers report about their steps: a file of JSON lines, which the round follows."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from server.store.learning.round_metrics import StepMetrics

FILE = "steps.jsonl"
POLL_SECONDS = 0.5


class StepLog:
    """The file in a round's directory, begun anew."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / FILE
        self._file.write_text("", encoding="utf-8")

    def write(self, step: StepMetrics) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")


@contextmanager
def followed(directory: Path, on_step: Callable[[StepMetrics], None]) -> Iterator[None]:
    """During the block, `on_step` hears of each step once, also if workers begin anew and repeat some."""
    file, ended, heard = directory / FILE, threading.Event(), 0
    file.unlink(missing_ok=True)

    def hear() -> None:
        nonlocal heard
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        for line in lines[heard:]:
            if line.endswith("\n"):
                on_step(StepMetrics(**json.loads(line)))
                heard += 1

    def follow() -> None:
        while not ended.wait(POLL_SECONDS):
            hear()

    thread = threading.Thread(target=follow, name="steps", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        hear()
        file.unlink(missing_ok=True)
