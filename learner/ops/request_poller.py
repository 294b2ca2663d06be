"""The ear of `learner schedule`: says that it listens, and notices requests for a round. A thread of its own.

It waits for a data directory that no server has made yet. What keeps it from the store, a full disk say, is said once
and tried again: a scheduler that nobody hears should not end, and one that ends should not be taken to listen.
"""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from learner.process import unique_name
from server.shared.errors import DatabaseError, ServiceError
from server.store.store import Store

# A request waits so long at most before it is noticed, and a heartbeat is written as often as a server's.
LOOK_SECONDS, HEARTBEAT_SECONDS = 2.0, 5.0


class RequestPoller:
    """`start` it, and `stop` it when nothing is at work any more. `request` is called, again and again, while one
    waits; `next_time` tells when the clock starts a round."""

    def __init__(
        self,
        data_dir: Path,
        request: Callable[[], None],
        next_time: Callable[[], float | None],
        look: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.name = unique_name()
        self._data_dir, self._request, self._next_time, self._say = data_dir, request, next_time, say
        self._look = look
        # What keeps it from the store.
        self._said = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What was taken and not ended waits for the next learner."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if Store.exists(self._data_dir):
                    self._listen()
            except (ServiceError, DatabaseError, OSError) as error:
                if str(error) != self._said:
                    self._said = str(error)
                    self._say(f"requests cannot be heard: {error}")
            self._pause()

    def _listen(self) -> None:
        with closing(Store.open(self._data_dir)) as store:
            requests, due = store.round_requests, 0.0
            while not self._stop.is_set():
                if time.monotonic() >= due:
                    requests.listen(self.name, self._next_time())
                    due, self._said = time.monotonic() + HEARTBEAT_SECONDS, ""
                if requests.waits():
                    self._request()
                self._pause()
            requests.leave(self.name)

    def _pause(self) -> None:
        self._look()
        self._stop.wait(LOOK_SECONDS)
