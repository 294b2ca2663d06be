"""The store on separate threads, so that a database never blocks the event loop.

One thread runs all writes in order. Where the database lets users' data be written side by side, there are several, and
each does the work of its share of the users in order; the first also does what is of no single user. Another runs reads
that may be long, of a conversation or a list, so that votes do not wait for them; a read starts after all earlier work,
so that callers see what they and others did.

Work that arrives during a commit shares the next one: under load one commit serves many calls. When many calls come at
once, the next group waits as long as more of them come, but only for a moment.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from server.store.store import Store

# A commit costs as much as several votes. After a group of MANY calls, more are likely to come, each within a STEP.
MANY, STEP_SECONDS, MOST_STEPS = 8, 0.001, 8
# Where writes go on side by side: most of a vote's time is waiting for the database.
WRITERS = 4

T = TypeVar("T")
Work = Callable[[Store], Any]


class StoreThread:
    """`await store(lambda store: store.feedback.submit_thumb(...))`. Calls run one by one; `read` runs beside them."""

    def __init__(self, data_dir: Path) -> None:
        first = _Writer(data_dir)
        others = WRITERS - 1 if first.store.side_by_side else 0
        self._writers = [first, *(_Writer(data_dir) for _ in range(others))]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._reading = self._reader.submit(Store.open, data_dir).result()

    async def __call__(self, work: Callable[[Store], T], user: str | None = None) -> T:
        """Run `work`, and return its result once it is on disk. If the caller is cancelled, the work is still done.

        With `user`, it depends on that user's data alone and changes nothing else; see `Database.group`."""
        if user is not None:
            return await self._writers[crc32(user.encode()) % len(self._writers)].run(work, user)
        # After all that was asked before, whoever does it.
        before = [writer.enqueue(lambda store: None, "") for writer in self._writers[1:] if writer.busy]
        return await self._writers[0].run(work, user, before)

    async def read(self, work: Callable[[Store], T]) -> T:
        """Run `work`, which must not write, after all earlier work is on disk, and return its result."""
        await asyncio.gather(*(writer.enqueue(lambda store: None, "") for writer in self._writers if writer.busy))

        def as_of_now() -> T:
            with self._reading.reading():
                return work(self._reading)

        return await asyncio.get_running_loop().run_in_executor(self._reader, as_of_now)

    async def close(self) -> None:
        """Close after all earlier work; later calls raise RuntimeError."""
        await asyncio.gather(*(writer.ended() for writer in self._writers))
        await asyncio.get_running_loop().run_in_executor(self._reader, self._reading.close)
        self._reader.shutdown()
        for writer in self._writers:
            await writer.close()


class _Writer:
    """A thread with a connection; its calls run one by one, in groups that share a commit."""

    def __init__(self, data_dir: Path) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")
        self.store = self._executor.submit(Store.open, data_dir).result()
        self._waiting: list[tuple[Work, str | None, asyncio.Future[Any]]] = []
        self._before: list[asyncio.Future[Any]] = []
        self._running: asyncio.Task[None] | None = None
        self._last_group = 0

    @property
    def busy(self) -> bool:
        return self._running is not None

    async def run(self, work: Callable[[Store], T], user: str | None, before: Sequence[asyncio.Future[Any]] = ()) -> T:
        """See `StoreThread.__call__`. With an empty `user` the work writes nothing. It begins after `before`."""
        return await self.enqueue(work, user, before)

    def enqueue(
        self, work: Callable[[Store], T], user: str | None, before: Sequence[asyncio.Future[Any]] = ()
    ) -> asyncio.Future[T]:
        """The same, without waiting for its end."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, user, done))
        self._before.extend(before)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return done

    async def ended(self) -> None:
        if self._running:
            await self._running

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self.store.close)
        self._executor.shutdown()

    async def _run(self) -> None:
        while self._waiting:
            if self._last_group >= MANY:
                await self._more()
            calls, self._waiting, before, self._before = self._waiting, [], self._before, []
            if before:
                await asyncio.wait(before)
            self._last_group = len(calls)
            works, users = [work for work, _, _ in calls], [user for _, user, _ in calls]
            try:
                outcomes = await asyncio.get_running_loop().run_in_executor(self._executor, self._group, works, users)
            except Exception as error:
                # The commit failed, or the store is closed: none of the calls was stored.
                outcomes = [(None, error)] * len(works)
            for (_, _, done), (result, failure) in zip(calls, outcomes, strict=True):
                if done.cancelled():
                    continue
                if failure is None:
                    done.set_result(result)
                else:
                    done.set_exception(failure)
        self._running = None

    async def _more(self) -> None:
        """Wait while more calls come."""
        for _ in range(MOST_STEPS):
            waiting = len(self._waiting)
            await asyncio.sleep(STEP_SECONDS)
            if len(self._waiting) == waiting:
                break

    def _group(self, works: list[Work], users: list[str | None]) -> list[tuple[Any, Exception | None]]:
        outcomes: list[tuple[Any, Exception | None]] = []
        with self.store.group(None if None in users else {user for user in users if user}):
            for work in works:
                try:
                    outcomes.append((work(self.store), None))
                except Exception as error:
                    outcomes.append((None, error))
        return outcomes
