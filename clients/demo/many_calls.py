"""Many calls at once, watched by whoever waits for them."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WATCH_SECONDS = 1.0


class _SkippedError(Exception):
    """An item that was not begun."""


def at_once(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    concurrency: int,
    on_result: Callable[[Result], object] = lambda result: None,
    watch: Callable[[], object] = lambda: None,
) -> list[Result]:
    """The results of `work` on every item, in their order, on so many threads.

    `on_result` hears of each as it comes, and `watch` is called every second, both in the calling thread. What these or
    the first failing `work` raise ends it: no item more is begun. Those that were begun are not waited for; they end by
    themselves, at the latest when the client that they use is closed.
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
                # The one that failed says why.
                if not isinstance(future.exception(), _SkippedError):
                    on_result(future.result())
            watch()
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return [future.result() for future in futures]
