"""The demo's own server: `server serve` as a subprocess, from start to SIGTERM."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from clients.client import Client

START_SECONDS = 240
STOP_SECONDS = 60
READY = re.compile(r"^serving \S+ on (\S+:\d+)$")


class DemoError(Exception):
    """The demo cannot go on; the message is one sentence for the person who runs it."""


class Server:
    """A server on a free loopback port, for a `with` block after `start`.

    `say` hears each line that it prints until it is ready; all of them are in DATA_DIR/server.log.
    """

    def __init__(self, data_dir: Path, model: str | None, say: Callable[[str], None]) -> None:
        self.address = ""
        self._command = [sys.executable, "-m", "server.cli", "serve", "--data-dir", str(data_dir), "--port", "0"]
        self._command += ["--model", model] if model else []
        self._log = data_dir / "server.log"
        self._say = say
        self._ready = threading.Event()

    def start(self) -> None:
        """Returns once the server is healthy; raises DemoError with its last words otherwise."""
        self._process = subprocess.Popen(
            self._command,
            # A fresh directory would be compiled for anew, which takes longer than so few answers gain by it. And the
            # port of the metrics may be another server's.
            env={"PREFLOOP_COMPILE": "false", "PREFLOOP_METRICS_PORT": "0", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Ctrl-C in the terminal reaches us alone; we stop the server in our order.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            if not self._ready.wait(START_SECONDS) or not self.address:
                raise DemoError(f"The server did not start: {self._last_words()}")
            with Client(self.address) as client:
                client.wait_until_serving(timeout=30)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not end it. Raises DemoError where the server did not end well."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.returncode and self.address:
            raise DemoError(f"The server ended with code {self._process.returncode}: {self._last_words()}")

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

    def _read(self) -> None:
        assert self._process.stdout
        with self._log.open("w") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                if ready := READY.match(line):
                    self.address = ready[1]
                    self._ready.set()
                elif not self._ready.is_set():
                    self._say(line.strip())
        self._ready.set()  # It ended; nobody should wait on.

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing."


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that what was started is stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
