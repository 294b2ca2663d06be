"""Text to tokens on a thread of its own, one text at a time, behind whatever else wants the processor: long messages,
most of which are refused for their length, must not hold up votes and streams."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# How far the thread steps back.
NICE = 10
# A token of text has fewer, but for rows of spaces and the like: what has more characters is refused unread.
CHARS_A_TOKEN = 16


def _step_back() -> None:
    # On Linux each thread has a priority of its own.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


_thread = ThreadPoolExecutor(1, thread_name_prefix="encoding", initializer=_step_back)


async def encoding(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What `work` returns."""
    return await asyncio.get_running_loop().run_in_executor(_thread, partial(work, *arguments, **named))
