"""The thread with which `learner schedule` polls for requested rounds and reports that it is listening.

It waits if no server has created the data directory yet. An error of the store, such as a full disk, is reported once
and retried: it should not end the scheduler. When the scheduler ends, it is no longer listed as listening.
"""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from learner.process import unique_name
from server.shared.errors import DatabaseError, ServiceError
from server.store.store import Store

# Maximum delay before a request is noticed, and the interval of heartbeats, the same as a server's.
LOOK_SECONDS, HEARTBEAT_SECONDS = 2.0, 5.0


class RequestPoller:
    """Call `start`, and `stop` when no round is running any more. `request` is called repeatedly while a request waits;
    `next_time` returns when the clock starts a round."""

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
        # The last error that was reported.
        self._said = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread. A request that was accepted and not finished waits for the next learner."""
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
                    self._say(f"requests cannot be read: {error}")
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
