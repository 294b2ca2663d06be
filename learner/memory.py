"""How this process gets memory from the kernel."""

import ctypes

# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Freed blocks stay with the process, where its C library is glibc.

    Training makes and drops tensors of many megabytes in every pass. By default each is mapped and unmapped anew, and
    the kernel's clearing of the pages took a fifth of an update's time (docs/decisions/0009)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
