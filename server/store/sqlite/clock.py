"""A clock that nobody sets: seconds since the machine started, and which start that was.

Leases and heartbeats say how long ago something was. The time of day jumps, when a clock is set right or a machine's
battery was empty, and with it every such answer. This clock also runs while the machine sleeps. After another start
nothing that was alive is.
"""

import time
from functools import cache
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def uptime() -> float:
    """Seconds since the machine started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def boot_id() -> str:
    """Of this start of the machine; empty where the kernel does not say, which then counts as one start."""
    try:
        return BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
