"""The store on a thread of its own, so that SQLite never blocks the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from server.store import FeedbackStore

T = TypeVar("T")


class StoreThread:
    """`await store(lambda store: store.submit_thumb(...))`. Calls run one after the other."""

    def __init__(self, data_dir: Path) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._store = self._executor.submit(FeedbackStore.open, data_dir).result()

    async def __call__(self, work: Callable[[FeedbackStore], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._store)

    def close(self) -> None:
        """After what was asked before; later calls raise RuntimeError."""
        self._executor.submit(self._store.close)
        self._executor.shutdown()
