"""Long answers, one after another on a few threads: the traffic during the demo's swap."""

import itertools
import threading

from clients.client import Client
from clients.demo.voter import Answer, ask

STREAMS = 4
MAX_TOKENS = 300
STORIES = ("a lighthouse keeper", "a lost kite", "two neighbours and a wall", "a baker's first day", "an old ferry")


class LongStreams:
    """`start` keeps STREAMS answers of up to MAX_TOKENS tokens running; `stop` lets the open ones end."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._answers: list[Answer] = []
        self._errors: list[Exception] = []

    @property
    def running(self) -> bool:
        return bool(self._threads)

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._talk, args=(first,)) for first in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[Answer]:
        """Returns every answer. Raises the first error of any stream."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return self._answers

    def leave(self) -> None:
        """Starts no more answers, without waiting for the open ones."""
        self._stopping.set()

    def _talk(self, first: int) -> None:
        for number in itertools.count(first):
            if self._stopping.is_set() or self._errors:
                return
            try:
                story = f"Tell me a very long story about {STORIES[number % len(STORIES)]}."
                self._answers.append(ask(self._client, story, max_tokens=MAX_TOKENS))
            except Exception as error:
                # Raised by `stop`; an exception in this thread would only be printed.
                self._errors.append(error)
