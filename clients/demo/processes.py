"""Runs prefloop's commands as processes: `Server` for `server serve`, `Process` for any other.

Each line of output is written to a log and passed to a callback. On Linux the process gets SIGTERM when its parent
ends for any reason.
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

# Limits for a server's start: without output, and in total. Two cores with AVX2 take 95 s, mostly without output.
SILENT_SECONDS = 600.0
START_SECONDS = 1800.0
READY_SECONDS = 30.0
STOP_SECONDS = 60.0
READY = re.compile(r"^serving \S+ on (\S+:\d+)$")
# Asks Linux for SIGTERM when the parent (the first argument) ends, then executes the command. 1 is PR_SET_PDEATHSIG.
END_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("The parent process has ended.")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


class DemoError(Exception):
    """The demo cannot continue; the message is one sentence for the user."""


class Process:
    """Runs `python -m COMMAND` until `stop`. A thread passes each line of output to `on_line` and writes it to `log`.

    `environment` is added to our own environment, which takes precedence.
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
            # Ctrl-C in the terminal must reach only us, so that we stop the processes in our order.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether the process ends within this many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> int:
        """Sends SIGTERM, then SIGKILL if that does not end the process; returns its exit status."""
        if not self.ended():
            self._process.terminate()
        if not self.ended(STOP_SECONDS):
            self._process.kill()
            self._process.wait()
        # An orphaned child may hold the pipe open.
        self._reader.join(STOP_SECONDS)
        return self._process.returncode

    def kill(self) -> None:
        """Sends SIGKILL, as a lost machine would."""
        self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        lines = [line for line in self._log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing."

    def _read(self) -> None:
        assert self._process.stdout
        with self._log.open("w", encoding="utf-8") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                self._on_line(line.strip())


class Server:
    """A server on a free loopback port, for use in a `with` block after `start`.

    `say` gets its status lines until it is ready; all of its output is in DATA_DIR/server.log.
    """

    def __init__(self, data_dir: Path, model: str | None, say: Callable[[str], object]) -> None:
        self.address = ""
        self._command = ["server.cli", "serve", "--data-dir", str(data_dir), "--port", "0"]
        self._command += ["--model", model] if model else []
        self._log = data_dir / "server.log"
        self._say = say
        self._ready = threading.Event()

    def start(self) -> None:
        """Returns once the server is healthy; otherwise raises DemoError with its last line of output."""
        self._limit = Limit("The server's start", START_SECONDS, silent=SILENT_SECONDS)
        # Compiling for a fresh directory takes longer than it saves on so few answers. The default metrics port may be
        # in use by another server.
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
            raise DemoError(f"{error} Its last output: {words}") from None
        except BaseException:
            self._process.stop()
            raise

    def check(self) -> None:
        if self._process.ended():
            raise DemoError(f"The server exited with code {self._process.stop()}: {self._process.last_words()}")

    def stop(self) -> None:
        """Sends SIGTERM, then SIGKILL if needed. Raises DemoError if the exit code is not 0."""
        code = self._process.stop()
        if code and self.address:
            raise DemoError(f"The server exited with code {code}: {self._process.last_words()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except DemoError:
            # The first error matters more.
            if error is None:
                raise

    def _hear(self, line: str) -> None:
        if ready := READY.match(line):
            self.address = ready[1]
            self._ready.set()
        elif not self._ready.is_set():
            self._limit.progress()
            # The server's status lines begin in lower case; log lines and library output do not.
            if line[:1].islower():
                self._say(line)


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise KeyboardInterrupt like Ctrl-C, so that started processes are stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
