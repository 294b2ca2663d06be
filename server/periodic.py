"""What a server does again and again beside its calls."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

log = logging.getLogger(__name__)


async def repeat_until_cancelled(work: Callable[[], Awaitable[object]], seconds: float, complaint: str) -> NoReturn:
    """Does `work`, and again after `seconds`, until cancelled. The second boundary where errors end: work that stopped
    for one would be missed for good."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s; trying again", complaint)
        await asyncio.sleep(seconds)
