"""Repeats background work."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

log = logging.getLogger(__name__)


async def repeat_until_cancelled(work: Callable[[], Awaitable[object]], seconds: float, complaint: str) -> NoReturn:
    """Call `work` repeatedly, `seconds` apart, until cancelled. Errors are logged, so that one failure does not end the
    repetition."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s; trying again", complaint)
        await asyncio.sleep(seconds)
