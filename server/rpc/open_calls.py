"""The calls that are open, by user, so that they can be ended when the user is forgotten.

A call that was let in earlier may still have its message to send, or wait its turn in a conversation: without this it
would write afterwards what was just removed.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import contextmanager

from server.shared.errors import FailedPreconditionError

# An engine may take its time to abort an answer; nothing that begins anything comes after the cancellation itself.
END_SECONDS = 5.0


class OpenCalls:
    """Who has which calls open."""

    def __init__(self) -> None:
        self._open: dict[str, dict[asyncio.Task[object], asyncio.Event]] = defaultdict(dict)
        self._ended: set[asyncio.Task[object]] = set()

    @contextmanager
    def open(self, user: str) -> Iterator[None]:
        """The calling task works for `user`. Raises FailedPreconditionError once it is ended."""
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
                "USER_FORGOTTEN", "This user was forgotten; nothing of this call was kept."
            ) from None
        finally:
            self._ended.discard(task)
            left.set()
            del self._open[user][task]
            if not self._open[user]:
                del self._open[user]

    async def end(self, user: str, but: Set[asyncio.Task[object]]) -> None:
        """Ends the user's calls `but` these; returns when they have let go."""
        others = {task: left for task, left in self._open.get(user, {}).items() if task not in but}
        self._ended |= set(others)
        for task in others:
            task.cancel()
        waiting = [asyncio.create_task(left.wait()) for left in others.values()]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=END_SECONDS)
            for wait in late:
                wait.cancel()
