"""Open calls by user, so that they can be ended when the user is deleted.

A call admitted earlier may still wait for its message, or for its turn in a conversation: without this it could write
again what was just deleted.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager

from server.shared.errors import FailedPreconditionError

# How long to wait. An engine may be slow to abort an answer, but a cancelled call starts nothing new.
END_SECONDS = 5.0


class OpenCalls:
    """The open calls of each user."""

    def __init__(self) -> None:
        self._open: dict[str, dict[asyncio.Task[object], asyncio.Event]] = defaultdict(dict)
        self._ended: set[asyncio.Task[object]] = set()

    @contextmanager
    def open(self, user: str) -> Iterator[None]:
        """Register the current task as a call of `user`. Raises FailedPreconditionError if `end` ends it."""
        task, left = asyncio.current_task(), asyncio.Event()
        assert task is not None
        self._open[user][task] = left
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
            left.set()
            del self._open[user][task]
            if not self._open[user]:
                del self._open[user]

    async def end(self, user: str, but: Set[asyncio.Task[object]]) -> None:
        """End the user's calls except `but`, and wait at most END_SECONDS for them to finish."""
        others = {task: left for task, left in self._open.get(user, {}).items() if task not in but}
        self._ended |= set(others)
        for task in others:
            task.cancel()
        waiting = [asyncio.create_task(left.wait()) for left in others.values()]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=END_SECONDS)
            for wait in late:
                wait.cancel()
