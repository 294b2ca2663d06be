"""Health of an engine's process: a page of memory that the process writes and the server reads.

A request through vLLM's queue would wait behind the very step that may never end, and a spinning step uses its cores
like a working one. So the engine's process writes a heartbeat from a separate thread, and the end of each step. Times
are CLOCK_MONOTONIC's, which is one clock for all processes. Each field is one aligned double, written by one thread, so
no reader sees half of it.
"""

import mmap
import os
from dataclasses import dataclass

# The variable that tells the engine's process where the page is.
VARIABLE = "ENGINE_PULSE"
FIELDS = 8
# The thread beats twice per second; a process without a beat for STOPPED_SECONDS counts as stopped.
BEAT_SECONDS = 0.5
STOPPED_SECONDS = 10.0
# A step may take ten times as long as any before it, and at least this long.
STUCK_SECONDS = 30.0
STUCK_FACTOR = 10.0


@dataclass(frozen=True)
class Vitals:
    """The page's contents. `steps` were finished, the last at `step_time`; it took `step_seconds` for `step_tokens`. No
    step but the first took longer than `slowest_seconds`."""

    beat_time: float
    steps: int
    step_time: float
    step_seconds: float
    step_tokens: int
    slowest_seconds: float


class Pulse:
    """One engine's page: created by the server, found by the engine's process through its environment."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._fields = memoryview(self._page).cast("d")[:FIELDS]

    @classmethod
    def create(cls) -> "Pulse":
        """Create a page without a file, and set the variable through which later child processes find it."""
        descriptor = os.memfd_create("engine-pulse")
        os.truncate(descriptor, mmap.PAGESIZE)
        os.environ[VARIABLE] = f"/proc/{os.getpid()}/fd/{descriptor}"
        return cls(descriptor)

    @classmethod
    def find(cls) -> "Pulse | None":
        """The page that this process's server created, or None."""
        path = os.environ.get(VARIABLE)
        return cls(os.open(path, os.O_RDWR)) if path else None

    def close(self) -> None:
        self._fields.release()
        self._page.close()
        os.close(self._descriptor)

    def beat(self, now: float) -> None:
        self._fields[0] = now

    def step(self, began: float, now: float, tokens: int) -> None:
        """Record the end of a step. The time and the count are written last, so that a reader who sees them also sees
        the other fields."""
        seconds = now - began
        self._fields[3], self._fields[4] = seconds, tokens
        # The very first step has more to do than any later one.
        if self._fields[1]:
            self._fields[5] = max(self._fields[5], seconds)
        self._fields[2] = now
        self._fields[1] += 1

    def read(self) -> Vitals:
        beat, steps, at, seconds, tokens, slowest = self._fields[:6].tolist()
        return Vitals(beat, int(steps), at, seconds, int(tokens), slowest)


def complaint(vitals: Vitals, now: float, working_since: float | None, hang_seconds: float | None) -> str | None:
    """Why the engine counts as hung, as a sentence; None while it is healthy.

    `working_since` is when the server began to wait for a step, None while it waits for none. `hang_seconds` replaces
    both limits."""
    stopped = hang_seconds or STOPPED_SECONDS
    if now - vitals.beat_time > stopped:
        return f"the engine's process has not run for {stopped:.0f} s"
    if working_since is None:
        return None
    stuck = hang_seconds or max(STUCK_SECONDS, STUCK_FACTOR * vitals.slowest_seconds)
    if now - max(vitals.step_time, working_since) > stuck:
        return (
            f"the engine has not finished a step for {stuck:.0f} s (the slowest so far: {vitals.slowest_seconds:.1f} s)"
        )
    return None
