"""Open calls by user, so that they can be ended when the user is deleted.

A call admitted earlier may still wait for its message, or for its turn in a conversation: without this it could write
again what was just deleted.
"""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

from server.shared.errors import FailedPreconditionError

# How long to wait. An engine may be slow to abort an answer, but a cancelled call starts nothing new.
END_SECONDS = 5.0


@dataclass(frozen=True)
class _Call:
    left: asyncio.Event
    began: float


class OpenCalls:
    """The open calls of each user, at this server."""

    def __init__(self) -> None:
        self._open: dict[str, dict[asyncio.Task[object], _Call]] = defaultdict(dict)
        self._ended: set[asyncio.Task[object]] = set()
        # Users whose calls have ended since `seen` was asked.
        self._left: set[str] = set()

    @contextmanager
    def open(self, user: str) -> Iterator[None]:
        """Register the current task as a call of `user`. Raises FailedPreconditionError if `end` ends it."""
        task, call = asyncio.current_task(), _Call(asyncio.Event(), time.monotonic())
        assert task is not None
        self._open[user][task] = call
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            task.uncancel()
            raise FailedPreconditionError(
                "USER_FORGOTTEN", "This user was deleted; nothing from this call was stored."
            ) from None
        finally:
            self._ended.discard(task)
            call.left.set()
            self._left.add(user)
            del self._open[user][task]
            if not self._open[user]:
                del self._open[user]

    def seen(self) -> set[str]:
        """Who has open calls, or had some since this was asked the last time."""
        left, self._left = self._left, set()
        return left | set(self._open)

    async def end(self, user: str, but: Set[asyncio.Task[object]], began_before: float = math.inf) -> None:
        """End the user's calls except `but` that began before a time (`time.monotonic`), and wait at most END_SECONDS
        for them to finish."""
        calls = self._open.get(user, {}).items()
        others = {task: call for task, call in calls if task not in but and call.began < began_before}
        self._ended |= set(others)
        for task in others:
            task.cancel()
        waiting = [asyncio.create_task(call.left.wait()) for call in others.values()]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=END_SECONDS)
            for wait in late:
                wait.cancel()
