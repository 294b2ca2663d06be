"""Many calls at once, watched by the calling thread."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WATCH_SECONDS = 1.0


class _SkippedError(Exception):
    """An item that was not started."""


def at_once(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    concurrency: int,
    on_result: Callable[[Result], object] = lambda result: None,
    watch: Callable[[], object] = lambda: None,
) -> list[Result]:
    """The results of `work` on every item, in order, computed on `concurrency` threads.

    `on_result` is called with each result as it arrives, and `watch` every second, both in the calling thread. The
    first exception from any of the three is raised: no more items are started, and running items are not waited for.
    They end by themselves, at the latest when their client is closed.
    """
    stop = threading.Event()

    def begin(item: Item) -> Result:
        if stop.is_set():
            raise _SkippedError
        try:
            return work(item)
        except BaseException:
            stop.set()
            raise

    pool = ThreadPoolExecutor(concurrency)
    futures = [pool.submit(begin, item) for item in items]
    pending: set[Future[Result]] = set(futures)
    try:
        while pending:
            ended, pending = wait(pending, WATCH_SECONDS, FIRST_COMPLETED)
            for future in ended:
                # A skipped item follows a failed one, whose exception is raised instead.
                if not isinstance(future.exception(), _SkippedError):
                    on_result(future.result())
            watch()
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]
