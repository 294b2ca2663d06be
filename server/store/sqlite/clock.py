"""A clock that cannot be set: seconds since the machine started, and an id of that start.

Leases and heartbeats depend on how long ago something was. The time of day jumps when a clock is set or a machine's
battery was empty, and would distort this. This clock also runs while the machine sleeps. After a restart of the
machine, no earlier lease or heartbeat is valid.
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
    """Id of this start of the machine; empty if the kernel has none, so that all starts count as one."""
    try:
        return BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
