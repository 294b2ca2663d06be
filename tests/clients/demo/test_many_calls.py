import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from clients.demo import many_calls as module
from clients.demo.many_calls import at_once
from tests.clients.conftest import WAIT_SECONDS


def test_results_come_in_order_and_are_heard_as_they_come() -> None:
    second = threading.Event()
    heard: list[tuple[str, str]] = []

    def work(item: str) -> str:
        if item == "first":
            assert second.wait(WAIT_SECONDS)
        return item.upper()

    def hear(result: str) -> None:
        heard.append((result, threading.current_thread().name))
        second.set()

    assert at_once(work, ["first", "second"], concurrency=2, on_result=hear) == ["FIRST", "SECOND"]
    here = threading.current_thread().name
    assert heard == [("SECOND", here), ("FIRST", here)]


def test_the_first_failure_ends_it_and_is_raised() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise LookupError("This one.")

    with pytest.raises(LookupError, match="This one"):
        at_once(work, range(100), concurrency=1)
    assert begun == [0, 1, 2]


def test_who_watches_may_end_it_and_does_not_wait_for_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
    begun, go = threading.Event(), threading.Event()
    ended: list[int] = []

    def work(item: int) -> None:
        begun.set()
        assert go.wait(WAIT_SECONDS)
        ended.append(item)

    def watch() -> None:
        if begun.is_set():
            raise TimeoutError("It takes too long.")

    with pytest.raises(TimeoutError, match="too long"):
        at_once(work, range(3), concurrency=1, watch=watch)
    assert ended == []
    go.set()


def test_what_hears_may_end_it() -> None:
    def hear(result: int) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.submit(at_once, abs, [1, 2], concurrency=2, on_result=hear).result(WAIT_SECONDS)


# Forks a process for each line that the main thread runs. Ctrl-C comes at that line, and the process ends as usual.
# Prints how many lines there are.
INTERRUPT = """
import os, signal, sys
from itertools import count
from clients.demo.many_calls import at_once

# Python ignores what a weak reference's callback raises.
IGNORED = 3
came = False


def interrupt_at(line):
    passed = count(1)

    def trace(frame, event, arg):
        global came
        if event == "line" and next(passed) == line:
            came = True
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)


for line in count(1):
    if not os.fork():
        break
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status == 0:
        print(line - 1)
        sys.exit()
    assert status != -signal.SIGALRM, line
signal.alarm(10)
interrupt_at(line)
at_once(abs, range(8), concurrency=2)
sys.settrace(None)
if came:
    sys.exit(IGNORED)
"""


def test_the_process_ends_wherever_ctrl_c_comes() -> None:
    said = subprocess.run(
        [sys.executable, "-c", INTERRUPT], capture_output=True, text=True, timeout=6 * WAIT_SECONDS, check=True
    )
    assert int(said.stdout) > 50
