"""Many calls at once, watched by the calling thread."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WATCH_SECONDS = 1.0


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

    Ctrl-C may come at any moment. It interrupts Python's own locks half-way, so they stay locked for ever. So what the
    calling thread shares with the others has none: two queues and a dict, all written in C. A thread that was just
    being started may stay stuck, so all of them are daemons.
    """
    left = deque(enumerate(items))
    results: dict[int, Result] = {}
    ended: SimpleQueue[int | BaseException] = SimpleQueue()
    count = len(left)
    try:
        for _ in range(min(concurrency, count)):
            threading.Thread(target=_run, args=(work, left, results, ended), name="call", daemon=True).start()
        heard = 0
        while heard < count:
            try:
                news = ended.get(timeout=WATCH_SECONDS)
            except Empty:
                pass
            else:
                if isinstance(news, BaseException):
                    raise news
                heard += 1
                on_result(results[news])
            watch()
    finally:
        left.clear()
    return [results[place] for place in range(count)]


def _run(
    work: Callable[[Item], Result],
    left: deque[tuple[int, Item]],
    results: dict[int, Result],
    ended: "SimpleQueue[int | BaseException]",
) -> None:
    """Works on one item after another. Reports the place of each, or the error that ends the work of all."""
    while True:
        try:
            place, item = left.popleft()
        except IndexError:
            return
        try:
            results[place] = work(item)
        except BaseException as error:
            left.clear()
            ended.put(error)
        else:
            ended.put(place)
