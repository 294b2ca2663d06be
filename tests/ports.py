"""Ports of loopback, and who listens on them."""

import socket
import subprocess
import time
from typing import Any

SECONDS = 30


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until_open(port: int, process: "subprocess.Popen[Any]") -> None:
    """Return once somebody listens on the port. Raises AssertionError if the process ends before, or takes long."""
    deadline = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except ConnectionRefusedError:
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
