"""One real server, with the default model in a real vLLM engine, for all end-to-end tests."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue

import grpc
import pytest
from prefloop.v1 import chat_pb2_grpc, feedback_pb2_grpc, policy_pb2_grpc

START_SECONDS = 300
STOP_SECONDS = 60


class LiveServer:
    """`server serve` as an operator runs it. Start and stop it as often as a test likes; the data stays."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.data_dir = data_dir
        self.log: list[str] = []
        self.start(**settings)

    def start(self, **settings: str) -> None:
        # Eager: compiling takes a minute and changes nothing that is tested here.
        usual = {"PREFLOOP_COMPILE": "false", "PREFLOOP_POLL_SECONDS": "0.1", "PREFLOOP_METRICS_PORT": "0"}
        environment = {**os.environ, **usual, **settings}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", "--data-dir", str(self.data_dir), "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        lines: Queue[str] = Queue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        self.address = self._wait_until_serving(lines)
        self.channel = grpc.insecure_channel(self.address)
        self.chat = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.feedback = feedback_pb2_grpc.FeedbackServiceStub(self.channel)
        self.policies = policy_pb2_grpc.PolicyServiceStub(self.channel)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> list[int]:
        """SIGKILL; the processes below it as descriptors, which turn readable when they end."""
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


def children(pid: int) -> set[int]:
    """Every process below `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found |= {int(child)} | children(int(child))
    return found


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    data_dir = tmp_path_factory.mktemp("live")
    server = LiveServer(data_dir)
    yield server
    if server.process.poll() is None:
        server.stop()
    shutil.rmtree(data_dir)
