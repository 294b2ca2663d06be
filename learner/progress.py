"""Progress on stderr: bars with time remaining where a person looks, one line per finished stage where nobody does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stages:
    """Shows stages and keeps how long each took, in `seconds`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Times the block under `name` (blocks of one name add up); the block calls what it is given to advance."""
        started = time.monotonic()
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda n: progress.advance(task, n)
        took = time.monotonic() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self.console.print(f"{title}: {took:.1f} s", highlight=False)
