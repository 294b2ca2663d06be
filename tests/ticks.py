"""A fake clock and a fake event, advanced by the test, that replace `time` and `threading.Event`."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

WAIT_SECONDS = 10.0


class Ticks:
    """`pass_` advances the clock: the waiting thread wakes, does its work, and waits again."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._waiting = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    @classmethod
    def of(cls, module: Any, monkeypatch: pytest.MonkeyPatch) -> "Ticks":
        """Replaces the clock and events of one module."""
        ticks = cls()
        monkeypatch.setattr(module, "time", ticks)
        # Not in `threading` itself, since threads use its events internally.
        monkeypatch.setattr(module, "threading", SimpleNamespace(**{**vars(threading), "Event": lambda: Over(ticks)}))
        return ticks

    def monotonic(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        assert self._waiting.acquire(timeout=WAIT_SECONDS)
        assert seconds == self._seconds
        self.now += seconds
        self._go.release()
        # The thread waits again, so its work is done.
        assert self._waiting.acquire(timeout=WAIT_SECONDS)
        self._waiting.release()

    def wait(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting.release()
        assert self._go.acquire(timeout=WAIT_SECONDS)

    def wake(self) -> None:
        assert self._waiting.acquire(timeout=WAIT_SECONDS)
        self._go.release()


class Over:
    """An event whose wait ends when the test advances the clock, or when it is set."""

    def __init__(self, ticks: Ticks) -> None:
        self._ticks, self._set = ticks, False

    def wait(self, seconds: float) -> bool:
        self._ticks.wait(seconds)
        return self._set

    def set(self) -> None:
        self._set = True
        self._ticks.wake()
