"""Time limits of waits."""

import time
from collections.abc import Callable


class OverdueError(Exception):
    """A wait exceeded its limit; the message is a sentence that names what was waited for."""


class Limit:
    """Ends the wait for `what` after `total` seconds, or `silent` seconds after its last `progress`.

    Any thread may report progress; the waiting thread calls `check` repeatedly.
    """

    def __init__(
        self, what: str, total: float, *, silent: float | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self.total = total
        self.silent = total if silent is None else silent
        self._now = now
        self._began = self._last = now()

    def progress(self) -> None:
        """Reports progress."""
        self._last = self._now()

    def check(self) -> None:
        """Raises OverdueError once the limit is exceeded."""
        now = self._now()
        if now - self._began > self.total:
            raise OverdueError(f"{self._what} took longer than {self.total:.0f} s.")
        if now - self._last > self.silent:
            raise OverdueError(f"{self._what} made no progress for {self.silent:.0f} s.")
