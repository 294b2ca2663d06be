"""Our own commands as processes: `server serve` from its start to SIGTERM, and what any other needs, too.

Each writes its lines to a log and tells them. On Linux it is sent SIGTERM when whoever started it ends, however that
happened.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from clients.client import Client
from clients.demo.time_limit import Limit, OverdueError

# Of a server's start: without a line, and in all. Two cores with AVX2 take 95 s, most of them without a line.
SILENT_SECONDS = 600.0
START_SECONDS = 1800.0
READY_SECONDS = 30.0
STOP_SECONDS = 60.0
READY = re.compile(r"^serving \S+ on (\S+:\d+)$")
# Asks Linux for SIGTERM at the end of the parent, its first argument, and becomes the command that follows. 1 is
# PR_SET_PDEATHSIG.
END_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("Whoever started this has ended.")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


class DemoError(Exception):
    """The demo cannot go on; the message is one sentence for the person who runs it."""


class Process:
    """`python -m COMMAND` until `stop`. `on_line` hears each line that it prints, on a thread; all are in `log`.

    `environment` is what it gets beside our own, which goes before.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        on_line: Callable[[str], object],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        self._on_line = on_line
        log.write_text("", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-c", END_WITH_PARENT, str(os.getpid()), *command],
            env={**(environment or {}), **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C in the terminal reaches us alone; we stop what we started in our order.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it ends within so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> int:
        """SIGTERM, and SIGKILL where that does not end it; its exit status."""
        if not self.ended():
            self._process.terminate()
        if not self.ended(STOP_SECONDS):
            self._process.kill()
            self._process.wait()
        # A process that it left behind may hold the pipe open.
        self._reader.join(STOP_SECONDS)
        return self._process.returncode

    def last_words(self) -> str:
        """The last line that it printed."""
        lines = [line for line in self._log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing."

    def _read(self) -> None:
        assert self._process.stdout
        with self._log.open("w", encoding="utf-8") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                self._on_line(line.strip())


class Server:
    """A server on a free loopback port, for a `with` block after `start`.

    `say` hears what it says of its start until it is ready; all of its lines are in DATA_DIR/server.log.
    """

    def __init__(self, data_dir: Path, model: str | None, say: Callable[[str], object]) -> None:
        self.address = ""
        self._command = ["server.cli", "serve", "--data-dir", str(data_dir), "--port", "0"]
        self._command += ["--model", model] if model else []
        self._log = data_dir / "server.log"
        self._say = say
        self._ready = threading.Event()

    def start(self) -> None:
        """Returns once the server is healthy; raises DemoError with its last words otherwise."""
        self._limit = Limit("The server's start", START_SECONDS, silent=SILENT_SECONDS)
        # A fresh directory would be compiled for again, which takes longer than so few answers gain by it. And the port
        # of the metrics may be another server's.
        usual = {"PREFLOOP_COMPILE": "false", "PREFLOOP_METRICS_PORT": "0"}
        self._process = Process(self._command, self._log, self._hear, usual)
        try:
            while not self._ready.wait(1.0):
                if self._process.ended():
                    self._process.stop()
                    raise DemoError(f"The server did not start: {self._process.last_words()}")
                self._limit.check()
            with Client(self.address) as client:
                client.wait_until_serving(timeout=READY_SECONDS)
        except OverdueError as error:
            words = self._process.last_words()
            self._process.stop()
            raise DemoError(f"{error} Its last words: {words}") from None
        except BaseException:
            self._process.stop()
            raise

    def check(self) -> None:
        """Raises DemoError where the server has ended."""
        if self._process.ended():
            raise DemoError(f"The server ended with code {self._process.stop()}: {self._process.last_words()}")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not end it. Raises DemoError where the server did not end well."""
        code = self._process.stop()
        if code and self.address:
            raise DemoError(f"The server ended with code {code}: {self._process.last_words()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except DemoError:
            # What went wrong first matters more.
            if error is None:
                raise

    def _hear(self, line: str) -> None:
        if ready := READY.match(line):
            self.address = ready[1]
            self._ready.set()
        elif not self._ready.is_set():
            self._limit.progress()
            # Its own words begin in lower case; log lines and what libraries say do not.
            if line[:1].islower():
                self._say(line)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and the end of the terminal unwind like Ctrl-C, so that what was started is stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
