"""How much one user may ask for, and how much all of them together.

A refusal says when to come back. Counted from a call's first byte, before its message arrived: a caller who only opens
calls uses up their own share.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server import metrics
from server.errors import ResourceExhaustedError
from server.identity import Caller

# Answers that each RPC has sampled at once.
ANSWERS = {"/prefloop.v1.ChatService/Chat": 1, "/prefloop.v1.ChatService/Compare": 2}
# When to come back to a server that is full: about the time of an answer.
BUSY_SECONDS = 2.0


class Limits:
    """`user_rate` as "1200/minute", `user_calls` at once; of all users, `answers` under way or waiting."""

    def __init__(self, user_rate: str, user_calls: int, answers: int) -> None:
        self._rate: RateLimitItem = parse(user_rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._user_calls = user_calls
        self._most_answers = answers
        self._calls: Counter[str] = Counter()
        self.answers = 0

    @contextmanager
    def admit(self, caller: Caller, method: str) -> Iterator[None]:
        """The call counts for as long as the block runs. Raises ResourceExhaustedError."""
        user, answers = caller.user, ANSWERS.get(method, 0)
        if self._calls[user] >= self._user_calls:
            raise ResourceExhaustedError(
                "USER_CALLS", f"You have {self._user_calls} calls open; more are not taken at once.", BUSY_SECONDS
            )
        if answers and self.answers + answers > self._most_answers:
            raise ResourceExhaustedError("QUEUE_FULL", "The server answers as many as it can; try later.", BUSY_SECONDS)
        # Last: a call that is refused for another reason does not use the rate up.
        if not self._limiter.hit(self._rate, user):
            wait = max(self._limiter.get_window_stats(self._rate, user).reset_time - time.time(), 0.1)
            raise ResourceExhaustedError("USER_RATE", f"More than {self._rate} is not taken of one user.", wait)
        self._calls[user] += 1
        self.answers += answers
        metrics.ANSWERS.inc(answers)
        try:
            yield
        finally:
            metrics.ANSWERS.dec(answers)
            self.answers -= answers
            self._calls[user] -= 1
            if not self._calls[user]:
                del self._calls[user]
