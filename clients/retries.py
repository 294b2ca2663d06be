"""Retries: a call is retried if the server is unavailable, no part of the answer has arrived, and there is time left.

Only UNAVAILABLE is retried, except for an untrusted certificate. Pauses grow from a fifth of a second to five seconds;
each is shortened at random by up to half, so that the clients of a server that went down do not all return at once.
If the server gives a delay (google.rpc.RetryInfo), the pause is at least that long. This is the only retry mechanism:
gRPC gets no retry policy (docs/decisions/0028-retries.md).
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

# The default. A server that restarts is back within a minute or two.
PATIENCE_SECONDS = 120.0
FIRST_SECONDS = 0.2
LONGEST_SECONDS = 5.0

OnWait = Callable[[PrefloopError, float], object]


def log_wait(error: PrefloopError, seconds: float) -> None:
    """The default `on_wait`: logs a warning."""
    log.warning("%s Retrying for up to %.0f s.", error, seconds)


class Backoff:
    """The pauses of one call. `patience` (seconds) counts from its first failure, which is passed to `on_wait`."""

    def __init__(self, patience: float, on_wait: OnWait) -> None:
        self._patience = patience
        self._on_wait = on_wait
        self._end: float | None = None
        self._pause = FIRST_SECONDS

    def pause_after(self, error: PrefloopError) -> float | None:
        """Seconds until the call is retried; None if it is not."""
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
    """The pauses of all calls of one client, on any thread. `close` ends every pause."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.closed = False

    def wait(self, seconds: float, over: Callable[[], bool] = lambda: False) -> None:
        """Returns after `seconds`, on `close`, or once `over` is true; `over` is checked on `wake`."""
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
        """Returns after `seconds`, on `close`, or once `over` is true; `over` is checked on `wake`."""
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
