"""How much one user may ask for, and how much all of them together.

A refusal says when to come back. Counted from a call's first byte, before its message arrived: a caller who only opens
calls uses up their own share.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from throttled import MemoryStore, RateLimiterType, Throttled, per_min

from server import metrics
from server.errors import ResourceExhaustedError
from server.identity import Caller

CHAT, COMPARE = "/prefloop.v1.ChatService/Chat", "/prefloop.v1.ChatService/Compare"
# Calls of all who have no key, who may ask for health, at once.
STRANGERS = 1_000
# Users whose rate is remembered; of more than that, those who were not heard of for longest start anew.
USERS = 100_000
# When to come back to a server that is full: about the time of an answer.
BUSY_SECONDS = 2.0


class Limits:
    """Of a user `user_rate` calls a minute and `user_calls` at once; of all users `answers` under way or waiting, where
    a comparison is `compared` of them."""

    def __init__(self, user_rate: int, user_calls: int, answers: int, compared: int = 2) -> None:
        # As many at once as in a minute; from then on evenly spaced (generic cell rate algorithm).
        store = MemoryStore(options={"MAX_SIZE": USERS})
        self._rate = Throttled(using=RateLimiterType.GCRA.value, quota=per_min(user_rate), store=store)
        self._user_rate = user_rate
        self._user_calls = user_calls
        self._most_answers = answers
        self._answers_of = {CHAT: 1, COMPARE: compared}
        self._calls: Counter[str] = Counter()
        self._answers = 0

    @contextmanager
    def admit(self, caller: Caller, method: str) -> Iterator[None]:
        """The call counts for as long as the block runs. Raises ResourceExhaustedError."""
        user, answers = caller.user, self._answers_of.get(method, 0)
        most = self._user_calls if user else STRANGERS
        if self._calls[user] >= most:
            sentence = f"You have {most} calls open; more are not taken at once."
            raise ResourceExhaustedError("USER_CALLS", sentence, BUSY_SECONDS)
        if answers and self._answers + answers > self._most_answers:
            raise ResourceExhaustedError("QUEUE_FULL", "The server answers as many as it can; try later.", BUSY_SECONDS)
        # Last: a call that is refused for another reason does not use the rate up.
        if user and (turn := self._rate.limit(user)).limited:
            sentence = f"More than {self._user_rate} calls a minute are not taken of one user."
            raise ResourceExhaustedError("USER_RATE", sentence, turn.state.retry_after)
        self._calls[user] += 1
        self._answers += answers
        metrics.ANSWERS.inc(answers)
        try:
            yield
        finally:
            metrics.ANSWERS.dec(answers)
            self._answers -= answers
            self._calls[user] -= 1
            if not self._calls[user]:
                del self._calls[user]
