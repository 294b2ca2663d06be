"""Removes what deleted rows left behind (`server.store.files.residue`); every hour, conversations that are too old."""

import asyncio
import logging
from pathlib import Path

from server.shared.errors import DatabaseError
from server.store.files.residue import erase
from server.store.store_thread import StoreThread

log = logging.getLogger(__name__)

TIDY_SECONDS = 3600.0
# Rewriting a database holds writes up for some seconds a GiB and takes its size in memory: not done to a larger one
# while it serves.
REWRITE_MOST_BYTES = 2**30


class RetentionTask:
    """Removes for good what deleting rows leaves. One at a time."""

    def __init__(self, store: StoreThread, data_dir: Path, retention_days: float) -> None:
        self._store = store
        self._data_dir = data_dir
        self._retention_days = retention_days
        self._erasing = asyncio.Lock()

    async def erase(self, *, rewrite: bool = False) -> bool:
        """False where the files could not be rid of it yet. No error: the rows are gone, as callers asked."""
        async with self._erasing:
            try:
                emptied = await asyncio.to_thread(erase, self._data_dir, rewrite=rewrite)
            except (OSError, DatabaseError):
                log.exception("the files could not be rid of what was deleted; trying again within the hour")
                return False
        if not emptied:
            log.warning("another process reads the database, whose log holds what was deleted; trying again in an hour")
        return emptied

    async def tidy(self) -> None:
        """Call it every hour."""
        days = self._retention_days
        while days and await self._store(lambda store: store.deletion.expire(days)):
            pass
        small = await self._store(lambda store: store.bytes()) <= REWRITE_MOST_BYTES
        if not small and await self._store(lambda store: store.deletion.rewrite_due() > 0):
            log.warning("the database is too large to be rewritten while it serves: stop, and run `server compact`")
        await self.erase(rewrite=small)
