"""Progress of long tasks: a bar with the time left on a terminal, elsewhere a line every ten seconds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

EVERY_SECONDS = 10.0


class Task:
    """A long task: how many of its parts are done, `before` of them in an earlier run, and its current activity. Any
    thread may update it."""

    def __init__(self, title: str, total: int | None = None, before: int = 0) -> None:
        self.title = title
        self.total = total
        self.before = before
        self.done = before
        self.now = ""
        self._changing = threading.Lock()
        self.on_change: Callable[[], object] = lambda: None

    def advance(self) -> None:
        """Counts one more part as done."""
        with self._changing:
            self.done += 1
        self.on_change()

    def say(self, now: str) -> None:
        """Sets the current activity."""
        self.now = now
        self.on_change()

    def so_far(self, seconds: float) -> str:
        """ "voting: 40 of 150, 31 s so far, about 85 s left"; "starting: loading the model, 31 s so far"."""
        if self.total is None:
            return ": ".join(filter(None, [self.title, self.now])) + f", {seconds:.0f} s so far"
        done = self.done - self.before
        left = f", about {seconds / done * (self.total - self.done):.0f} s left" if done else ""
        return f"{self.title}: {self.done} of {self.total}, {seconds:.0f} s so far{left}"


@contextmanager
def progress(console: Console, title: str, total: int | None = None, before: int = 0) -> Iterator[Task]:
    """Shows the progress that the block reports through the yielded task."""
    task = Task(title, total, before)
    with _bar(console, task) if console.is_terminal else _lines(console, task):
        yield task


@contextmanager
def _bar(console: Console, task: Task) -> Iterator[None]:
    columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    columns += [TextColumn("{task.fields[now]}", markup=False)]
    if task.total is not None:
        columns = [TextColumn("{task.description:<16}"), BarColumn(bar_width=24), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    # A task without parts disappears when it ends.
    with Progress(*columns, console=console, transient=task.total is None) as bars:
        shown = bars.add_task(task.title, total=task.total, completed=task.done, now=task.now)
        task.on_change = lambda: bars.update(shown, completed=task.done, now=task.now)
        yield


@contextmanager
def _lines(console: Console, task: Task) -> Iterator[None]:
    started, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(EVERY_SECONDS):
            _say(console, task.so_far(time.monotonic() - started))

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
    parts = f" {task.done} of {task.total}," if task.total is not None else ""
    _say(console, f"{task.title}:{parts} {time.monotonic() - started:.0f} s")


def _say(console: Console, line: str) -> None:
    # Without markup or wrapping, since the output may be a file.
    console.print(Text(line), soft_wrap=True)
