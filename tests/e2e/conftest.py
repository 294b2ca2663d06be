"""Real servers, each with a real vLLM engine.

Most tests do not depend on the text and share one server with a tiny model; with `slow`, they run again with the
default model. A test that needs its own settings starts its own server.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue

import grpc
import pytest
from prefloop.v1 import chat_pb2_grpc, feedback_pb2_grpc, policy_pb2_grpc

from server.settings import DEFAULT_MODEL
from tests.e2e.tiny import save_tiny_model
from tests.tiers import slow

START_SECONDS = 300
STOP_SECONDS = 60


class LiveServer:
    """`server serve` as an operator runs it, with `model` and other settings as environment variables.

    It can be stopped and started any number of times; the data and the model stay."""

    def __init__(self, data_dir: Path, model: Path | str = DEFAULT_MODEL, **settings: str) -> None:
        self.data_dir = data_dir
        self.model = str(model)
        self.log: list[str] = []
        self.start(**settings)

    def start(self, **settings: str) -> None:
        usual = {
            "PREFLOOP_MODEL": self.model,
            # Compiling takes a minute and changes nothing that is tested here.
            "PREFLOOP_COMPILE": "false",
            "PREFLOOP_POLL_SECONDS": "0.1",
            "PREFLOOP_METRICS_PORT": "0",
        }
        environment = {**os.environ, **usual, **settings}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", "--data-dir", str(self.data_dir), "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, args=(self._lines,), daemon=True).start()
        self.address = self._wait_until_serving(self._lines)
        self.channel = grpc.insecure_channel(self.address)
        self.chat = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.feedback = feedback_pb2_grpc.FeedbackServiceStub(self.channel)
        self.policies = policy_pb2_grpc.PolicyServiceStub(self.channel)

    def stop(self) -> int:
        """Sends SIGTERM; returns the exit status."""
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def hear(self, part: str) -> None:
        """Waits for a line of output with `part`, after those of the start."""
        while part not in self._lines.get(timeout=START_SECONDS):
            pass

    def kill(self) -> list[int]:
        """Sends SIGKILL; returns descriptors of the child processes, which become readable when they end."""
        below = [os.pidfd_open(pid) for pid in children(self.process.pid)]
        self.channel.close()
        self.process.kill()
        self.process.wait(STOP_SECONDS)
        return below

    def _read(self, lines: "Queue[str]") -> None:
        for line in self.process.stdout or []:
            self.log.append(line)
            lines.put(line)
        lines.put("")

    def _wait_until_serving(self, lines: "Queue[str]") -> str:
        while True:
            try:
                line = lines.get(timeout=START_SECONDS)
            except Empty:
                line = ""
            if not line:
                self.process.kill()
                pytest.fail("the server did not start; its last lines:\n" + "".join(self.log[-30:]))
            if line.startswith("metrics on "):
                self.metrics_url = line.split()[-1]
            if line.startswith("serving "):
                return line.split()[-1]


@contextmanager
def live_server(data_dir: Path, model: Path | str = DEFAULT_MODEL, **settings: str) -> Iterator[LiveServer]:
    """Runs a server during the block, which may itself stop it."""
    server = LiveServer(data_dir, model, **settings)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def children(pid: int) -> set[int]:
    """All descendants of process `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found |= {int(child)} | children(int(child))
    return found


def engine(server: LiveServer) -> int:
    """The pid of the server's engine."""
    [pid] = [
        pid
        for pid in children(server.process.pid)
        if "EngineCor" in Path(f"/proc/{pid}/comm").read_text(encoding="utf-8")
    ]
    return pid


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session", params=["tiny", slow("default")])
def model(request: pytest.FixtureRequest) -> str:
    """The value for `--model`."""
    return DEFAULT_MODEL if request.param == "default" else str(request.getfixturevalue("tiny_model"))


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server with the default model, for tests whose answers must make sense or take long."""
    data_dir = tmp_path_factory.mktemp("default")
    # In float32, 1 GiB would hold 23,301 tokens: fewer than the longest prompts here, so that the newest answer waits.
    with live_server(data_dir, PREFLOOP_KV_CACHE_GIB="2") as server:
        yield server
    # Each version of this model takes 269 MB.
    shutil.rmtree(data_dir)


@pytest.fixture(scope="session")
def live(request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The shared server for tests that need no other."""
    if model == DEFAULT_MODEL:
        yield request.getfixturevalue("default")
        return
    with live_server(tmp_path_factory.mktemp("live"), model) as server:
        yield server
