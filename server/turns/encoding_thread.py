"""Text to tokens on a thread of its own, one text at a time: long messages, most of which are refused for their length,
must not hold up votes and streams. Its priority is the process's: stopped while it holds Python's lock, it would stop
all."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# A token of text has fewer, but for rows of spaces and the like: what has more characters is refused unread.
CHARS_A_TOKEN = 16


_thread = ThreadPoolExecutor(1, thread_name_prefix="encoding")


async def encoding(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What `work` returns."""
    return await asyncio.get_running_loop().run_in_executor(_thread, partial(work, *arguments, **named))
