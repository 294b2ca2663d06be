"""Encodes text to tokens on a separate thread, one text at a time.

Long messages, most of which are refused for their length, must not delay votes and streams. The thread has the
process's priority: if it were stopped while it holds the GIL, all threads would stop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# A token has fewer characters, except for rows of spaces and the like; text with more per token is refused unencoded.
CHARS_A_TOKEN = 16


_thread = ThreadPoolExecutor(1, thread_name_prefix="encoding")


async def encoding(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run `work` on the encoding thread and return its result."""
    return await asyncio.get_running_loop().run_in_executor(_thread, partial(work, *arguments, **named))
