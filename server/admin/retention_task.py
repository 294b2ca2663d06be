"""Removes what deleted rows left behind (`server.store.files.residue`) and, every hour, old conversations."""

import asyncio
import logging
from pathlib import Path

from server.shared.errors import DatabaseError
from server.store.files.residue import erase
from server.store.files.sharing import locally, remove_pruned
from server.store.store_thread import StoreThread

log = logging.getLogger(__name__)

TIDY_SECONDS = 3600.0
# Rewriting a database blocks writes for some seconds per GiB and needs its size in memory, so a larger one is not
# rewritten while it is served.
REWRITE_MOST_BYTES = 2**30


class RetentionTask:
    """Removes what deleted rows leave, one run at a time."""

    def __init__(self, store: StoreThread, data_dir: Path, retention_days: float) -> None:
        self._store = store
        self._data_dir = data_dir
        self._retention_days = retention_days
        self._erasing = asyncio.Lock()

    async def erase(self, *, rewrite: bool = False) -> bool:
        """Remove what deletions left. False, and no error, if that is not possible yet: the rows are deleted."""
        async with self._erasing:
            try:
                emptied = await asyncio.to_thread(erase, self._data_dir, rewrite=rewrite)
            except (OSError, DatabaseError):
                log.exception("deleted data could not be removed from the files; trying again within the hour")
                return False
        if not emptied:
            log.warning("another process reads the database, so its log has deleted data; trying again in an hour")
        return emptied

    async def tidy(self) -> None:
        """Delete old conversations, and remove what deletions and pruned versions left. Call it every hour."""
        await self._store(lambda store: store.keys.drop_forgotten())
        days = self._retention_days
        while days and await self._store(lambda store: store.deletion.expire(days)):
            pass
        small = await self._store(lambda store: store.bytes()) <= REWRITE_MOST_BYTES
        if not small and await self._store(lambda store: store.deletion.rewrite_due() > 0):
            log.warning("the database is too large to rewrite while serving: stop the server and run `server compact`")
        await self.erase(rewrite=small)
        await asyncio.to_thread(locally, self._data_dir, remove_pruned)
