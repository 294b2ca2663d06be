"""One learner at a time: the lease `learner`, renewed by a thread until the block ends.

A killed learner keeps others out for at most `seconds`, so the next one waits that long before it gives up. If a
learner is suspended for longer, its writes to the database are fenced off when it wakes up, and it is interrupted: it
must not go on writing files while another learner is running.
"""

import _thread
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from learner.process import unique_name
from server.shared.errors import DatabaseError, ServiceError
from server.store.learning.leases import LEARNER
from server.store.learning.records import Lease
from server.store.store import Store

# Delay after a failed renewal.
AGAIN_SECONDS = 1.0


@contextmanager
def learner_lease(store: Store, data_dir: Path, seconds: float, *, wait: bool = False) -> Iterator[Lease | None]:
    """Yields the lease, or None if another learner holds it; with `wait`, waits until it is free."""
    lease = _acquire(store, unique_name(), seconds, wait)
    if lease is None:
        yield None
        return
    stop, lost = threading.Event(), list[ServiceError]()
    thread = threading.Thread(target=_renew, args=(data_dir, lease, seconds, stop, lost), daemon=True)
    thread.start()
    try:
        try:
            yield lease
        finally:
            stop.set()
            thread.join()
    except KeyboardInterrupt:
        # The renewing thread caused the interruption.
        if lost:
            raise lost[0] from None
        raise
    finally:
        store.leases.release(lease)


def _acquire(store: Store, holder: str, seconds: float, wait: bool) -> Lease | None:
    deadline = math.inf if wait else time.monotonic() + seconds + 1
    while (lease := store.leases.acquire(LEARNER, holder, seconds)) is None:
        if time.monotonic() > deadline:
            return None
        time.sleep(0.5)
    return lease


def _renew(data_dir: Path, lease: Lease, seconds: float, stop: threading.Event, lost: list[ServiceError]) -> None:
    store = Store.open(data_dir)  # A connection belongs to one thread.
    try:
        wait = seconds / 3
        while not stop.wait(wait):
            try:
                store.leases.renew(lease, seconds)
                wait = seconds / 3
            except DatabaseError:
                # Locked for long, for example by a rewrite, or the disk is full. The lease may outlast that.
                wait = min(AGAIN_SECONDS, seconds / 3)
    except ServiceError as error:
        lost.append(error)
        _thread.interrupt_main(signal.SIGTERM)
    finally:
        store.close()
