"""Runs the demo as a process, with a fake server and a fake learner in separate processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import WAIT_SECONDS
from tests.clients.demo.world import World

VOTES, HELD_OUT = 20, 24


def make_fakes(work: Path) -> Path:
    """A folder whose `server.cli` and `learner.cli` are fakes."""
    for package in ("server", "learner"):
        folder = work / "fakes" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "cli.py").write_text("from tests.clients.demo.world import main\nmain()\n")
    return work / "fakes"


@dataclass(frozen=True)
class Ended:
    """The exit code and output of a demo run."""

    code: int
    said: str
    complained: str


class Demo:
    """Runs the demo, possibly several times, in one directory."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.work = root, work
        self.directory = work / "demo-data"
        self.world = World(self.directory)
        self.fakes = make_fakes(work)

    def run(self, *flags: str, **environment: str) -> Ended:
        """Runs the demo to its end."""
        process = self._start(flags, environment)
        said, complained = process.communicate(timeout=12 * WAIT_SECONDS)
        return Ended(process.returncode, said, complained)

    def interrupt(self, where: str, number: signal.Signals, *flags: str, **environment: str) -> Ended:
        """Runs the demo until a fake reaches `where`, then sends the signal. Returns once the fake has ended too."""
        path = self.work / "pause"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()
            listening.settimeout(6 * WAIT_SECONDS)
            process = self._start(flags, {**environment, "FAKE_PAUSE": where, "FAKE_SOCKET": str(path)})
            paused, _ = listening.accept()
            with paused:
                process.send_signal(number)
                said, complained = process.communicate(timeout=6 * WAIT_SECONDS)
                paused.settimeout(6 * WAIT_SECONDS)
                assert paused.recv(1) == b""
        return Ended(process.returncode, said, complained)

    @property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "demo.json").read_text()))

    def _start(self, flags: tuple[str, ...], environment: dict[str, str]) -> "subprocess.Popen[str]":
        path = [str(self.fakes), str(self.root), str(self.root / "proto")]
        plan = ["--votes", str(VOTES), "--held-out", str(HELD_OUT)]
        return subprocess.Popen(
            [sys.executable, "-m", "clients.demo", *plan, *flags],
            cwd=self.work,
            # gRPC would log a line if a server ends before its client.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path),
                "COLUMNS": "200",
                "GRPC_VERBOSITY": "NONE",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Iterator[Demo]:
    # A short path, since the length of a socket's path is limited.
    yield Demo(root, tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)
