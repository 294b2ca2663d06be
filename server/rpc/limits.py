"""How much one user may ask for, and how much all of them together.

A refusal says when to come back. Counted from a call's first byte, before its message arrived: a caller who only opens
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

# Calls of all who have no key, who may ask for health, at once.
STRANGERS = 1_000
# Users whose rate is remembered. With more users, those who were silent for longest start with a fresh rate.
USERS = 100_000
# When to come back to a server that is full: about the time of an answer.
BUSY_SECONDS = 2.0


class Limits:
    """Limits a user to `user_rate` calls a minute and `user_calls` at once, and all users together to `answers` running
    or waiting. Nobody has more of these than they leave to others."""

    def __init__(self, user_rate: int, user_calls: int, answers: int) -> None:
        # As many at once as in a minute; from then on evenly spaced (generic cell rate algorithm).
        store = MemoryStore(options={"MAX_SIZE": USERS})
        self._rate = Throttled(using=RateLimiterType.GCRA.value, quota=per_min(user_rate), store=store)
        self._user_rate = user_rate
        self._user_calls = user_calls
        self._most_answers = answers
        self._calls: Counter[str] = Counter()
        # In the order in which they came.
        self._strangers: dict[asyncio.Task[object], None] = {}
        self._answers: Counter[str] = Counter()

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[None]:
        """The call counts for as long as the block runs. Raises ResourceExhaustedError."""
        user = caller.user
        if not user:
            with self._stranger():
                yield
            return
        if self._calls[user] >= self._user_calls:
            sentence = f"You have {self._user_calls} calls open; more are not taken at once."
            raise ResourceExhaustedError("USER_CALLS", sentence, BUSY_SECONDS)
        # Last: a call that is refused for another reason does not use the rate up.
        if (turn := self._rate.limit(user)).limited:
            sentence = f"More than {self._user_rate} calls a minute are not taken of one user."
            raise ResourceExhaustedError("USER_RATE", sentence, turn.state.retry_after)
        with _counted(self._calls, user, 1):
            yield

    @contextmanager
    def _stranger(self) -> Iterator[None]:
        """A call of somebody without a key. Where there are too many, the one that came first ends: who asks for health
        has it at once, so it is one that does not send its message or does not read."""
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
            sentence = "More calls without a key came than are heard at once, and this one was open for longest."
            raise ResourceExhaustedError("STRANGERS", sentence, BUSY_SECONDS) from None
        finally:
            self._strangers.pop(task, None)

    @contextmanager
    def answering(self, user: str, answers: int) -> Iterator[None]:
        """So many answers of the user's count for as long as the block runs, sampled or waiting for that. Raises
        ResourceExhaustedError."""
        mine, left = self._answers[user], self._most_answers - self._answers.total() - answers
        if left < 0:
            raise ResourceExhaustedError("QUEUE_FULL", "The server answers as many as it can; try later.", BUSY_SECONDS)
        # Who has many must leave as many: so there is room for one more user, however many fill the queue.
        if mine and mine + answers > left:
            sentence = f"You have {mine} answers under way, and others ask, too; try later."
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
