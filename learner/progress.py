"""Progress on stderr: a bar with the time left on a terminal, otherwise a line every ten seconds; and a line for each
finished stage.

In a line about a running stage, the part before the first comma says what was done and the rest is the time. If the
first part changes, the round is making progress.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_SECONDS = 10.0

Advance = Callable[[int], None]


class Stages:
    """Shows stages and records how long each took, in `seconds`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, title: str, total: int | None = None) -> Iterator[Advance]:
        """Times the block under `name` (times of the same name add up). The block calls the yielded function to
        advance."""
        started = time.monotonic()
        shown = self._bar if self.console.is_terminal else self._lines
        with shown(title, total) as advance:
            yield advance
        took = time.monotonic() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self._say(f"{title}: {took:.1f} s")

    @contextmanager
    def _bar(self, title: str, total: int | None) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda n: progress.advance(task, n)

    @contextmanager
    def _lines(self, title: str, total: int | None) -> Iterator[Advance]:
        started, done, over = time.monotonic(), 0, threading.Event()

        def advance(n: int) -> None:
            nonlocal done
            done += n

        def tell() -> None:
            while not over.wait(EVERY_SECONDS):
                self._say(so_far(title, done, total, time.monotonic() - started))

        teller = threading.Thread(target=tell, name="progress", daemon=True)
        teller.start()
        try:
            yield advance
        finally:
            over.set()
            teller.join()

    def _say(self, line: str) -> None:
        # Not wrapped, since a program may read it.
        self.console.print(line, highlight=False, soft_wrap=True)


def so_far(title: str, done: int, total: int | None, seconds: float) -> str:
    """A line such as "judging candidates: 2 of 5, 160 s so far, about 240 s left"."""
    if total is None:
        return f"{title}, {seconds:.0f} s so far"
    left = f", about {seconds / done * (total - done):.0f} s left" if done else ""
    return f"{title}: {done} of {total}, {seconds:.0f} s so far{left}"
