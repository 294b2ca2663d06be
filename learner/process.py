"""How a process behaves beside others: its name, what it takes from the kernel, and to whom it gives way."""

import ctypes
import os
import socket
import uuid

# The exit status of a round that was asked to stop; a shell says it of what Ctrl-C ended.
STOPPED = 130
# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def unique_name() -> str:
    """Of this process, and never of another one."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def keep_freed_memory() -> None:
    """Freed blocks stay with the process, where its C library is glibc.

    Training makes and drops tensors of many megabytes in every pass. By default each is mapped and unmapped anew, and
    the kernel's clearing of the pages took a fifth of an update's time (docs/decisions/0009)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def give_way(nice: int, threads: int) -> None:
    """The server goes first where both want the processor; `threads` of computing at most, 0 for one on each core.

    Call it before torch computes: a pool of threads keeps its size."""
    import torch

    # What the process was started with counts too: `nice learner run-once` is not made less nice.
    os.nice(max(0, nice - os.nice(0)))
    if threads:
        torch.set_num_threads(threads)
