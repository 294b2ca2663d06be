"""When a call is sent again: the server is away, nothing of the answer was heard, and there is time left.

Only UNAVAILABLE counts as away, and not where certificates do not fit. Pauses grow from a fifth of a second to five
seconds; each is shortened at random by up to a half, so that clients who lost one server do not all come back at
once. A server that names a pause (google.rpc.RetryInfo) is not called before it is over. This is the only mechanism
that repeats calls: gRPC is given no retry policy (docs/decisions/0028-retries.md).
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import grpc

from clients.errors import PrefloopError, UntrustedError

log = logging.getLogger(__name__)

# By default: a server that starts again is back within a minute or two.
PATIENCE_SECONDS = 120.0
FIRST_SECONDS = 0.2
LONGEST_SECONDS = 5.0

OnWait = Callable[[PrefloopError, float], object]


def log_wait(error: PrefloopError, seconds: float) -> None:
    """What a client does by default when a call has to wait: a warning in the log."""
    log.warning("%s Trying again for %.0f s at most.", error, seconds)


class Backoff:
    """The pauses of one call. Its `patience` in seconds begins with its first failure, of which `on_wait` hears."""

    def __init__(self, patience: float, on_wait: OnWait) -> None:
        self._patience = patience
        self._on_wait = on_wait
        self._end: float | None = None
        self._pause = FIRST_SECONDS

    def pause_after(self, error: PrefloopError) -> float | None:
        """Seconds until the call is sent again; None where it is not."""
        if error.code is not grpc.StatusCode.UNAVAILABLE or isinstance(error, UntrustedError):
            return None
        now = time.monotonic()
        first = self._end is None
        self._end = end = now + self._patience if self._end is None else self._end
        pause = max(self._pause * random.uniform(0.5, 1.0), error.retry_seconds or 0.0)
        self._pause = min(2 * self._pause, LONGEST_SECONDS)
        if now + pause > end:
            return None
        if first:
            self._on_wait(error, self._patience)
        return pause


class Pauses:
    """Where the calls of one client wait, on any thread. Closing it ends every pause."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.closed = False

    def wait(self, seconds: float, over: Callable[[], bool] = lambda: False) -> None:
        """Returns after so many seconds, or once it is closed or `over`; `wake` says that this may be so."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or over(), seconds)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        self.closed = True
        self.wake()


class AsyncPauses:
    """The same for tasks."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.closed = False

    async def wait(self, seconds: float, over: Callable[[], bool] = lambda: False) -> None:
        """Returns after so many seconds, or once it is closed or `over`; `wake` says that this may be so."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (self.closed or over()):
                    await self._changed.wait()

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        self.closed = True
        self.wake()
