"""Limits for each user, and for all users together.

A refusal says when to retry. A call counts from its first byte, before its message has arrived: a caller who only opens
calls uses up their own share.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from throttled import MemoryStore, RateLimiterType, Throttled, per_min

from server.shared.errors import ResourceExhaustedError
from server.store.keys import Caller
from server.telemetry import metrics

# Concurrent calls, which are health checks, of all callers without a key.
STRANGERS = 1_000
# Users whose rate is tracked. With more users, those inactive for longest start with a fresh rate.
USERS = 100_000
# When to retry on a busy server: about the duration of an answer.
BUSY_SECONDS = 2.0


class Limits:
    """Limits a user to `user_rate` calls per minute and `user_calls` at once, the end users of an application together
    to `application_calls` at once, and all users together to `answers` running or waiting. No user may have more
    answers than are left for others."""

    def __init__(self, user_rate: int, user_calls: int, answers: int, application_calls: int) -> None:
        # A whole minute's calls may come at once, later ones evenly spaced (generic cell rate algorithm).
        store = MemoryStore(options={"MAX_SIZE": USERS})
        self._rate = Throttled(using=RateLimiterType.GCRA.value, quota=per_min(user_rate), store=store)
        self._user_rate = user_rate
        self._user_calls = user_calls
        self._most_answers = answers
        self._application_calls = application_calls
        self._applications: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        # In order of arrival.
        self._strangers: dict[asyncio.Task[object], None] = {}
        self._answers: Counter[str] = Counter()

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[None]:
        """Count the call while the block runs. Raises ResourceExhaustedError."""
        user = caller.user
        if not user:
            with self._stranger():
                yield
            return
        if self._calls[user] >= self._user_calls:
            sentence = f"You have {self._user_calls} calls open, which is the limit."
            raise ResourceExhaustedError("USER_CALLS", sentence, BUSY_SECONDS)
        # It names its end users itself, as many as it likes.
        application = caller.application
        if application and self._applications[application] >= self._application_calls:
            sentence = f"{application} has {self._application_calls} calls open, which is the limit."
            raise ResourceExhaustedError("APPLICATION_CALLS", sentence, BUSY_SECONDS)
        # Checked last: a call that is refused for another reason does not use up the rate.
        if (turn := self._rate.limit(user)).limited:
            sentence = f"The limit is {self._user_rate} calls per minute and user."
            raise ResourceExhaustedError("USER_RATE", sentence, turn.state.retry_after)
        with _counted(self._calls, user, 1), _counted(self._applications, application, 1 if application else 0):
            yield

    @contextmanager
    def _stranger(self) -> Iterator[None]:
        """A call without a key. If there are too many, the oldest one ends: health checks are answered at once, so its
        caller does not send the message or does not read."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._strangers) >= STRANGERS:
            first = next(iter(self._strangers))
            del self._strangers[first]
            first.cancel()
        self._strangers[task] = None
        try:
            yield
        except asyncio.CancelledError:
            if task in self._strangers:
                raise
            task.uncancel()
            sentence = "There are too many calls without a key, and this one was the oldest."
            raise ResourceExhaustedError("STRANGERS", sentence, BUSY_SECONDS) from None
        finally:
            self._strangers.pop(task, None)

    @contextmanager
    def answering(self, user: str, answers: int) -> Iterator[None]:
        """Count `answers` of the user, sampled or waiting, while the block runs. Raises ResourceExhaustedError."""
        mine, left = self._answers[user], self._most_answers - self._answers.total() - answers
        if left < 0:
            raise ResourceExhaustedError("QUEUE_FULL", "The server is busy; try again later.", BUSY_SECONDS)
        # A user must leave as many places as they take, so there is always room for one more user.
        if mine and mine + answers > left:
            sentence = f"You have {mine} answers pending; the rest of the queue is for others. Try again later."
            raise ResourceExhaustedError("USER_ANSWERS", sentence, BUSY_SECONDS)
        metrics.ANSWERS.inc(answers)
        try:
            with _counted(self._answers, user, answers):
                yield
        finally:
            metrics.ANSWERS.dec(answers)


@contextmanager
def _counted(counts: Counter[str], user: str, number: int) -> Iterator[None]:
    counts[user] += number
    try:
        yield
    finally:
        counts[user] -= number
        if not counts[user]:
            del counts[user]
