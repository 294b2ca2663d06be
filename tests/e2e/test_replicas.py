"""What `deploy/compose.replicas.yaml` starts, as processes: every program, command and setting is the file's own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import yaml
from prefloop.v1.chat_pb2 import ChatFinished, ChatStarted
from prefloop.v1.feedback_pb2 import THUMB_UP

from clients import Client
from clients.channel import Tls
from clients.demo.processes import READY, Process
from tests.e2e.small_rounds import small_round
from tests.pem import Pem, make_pem
from tests.postgres import PostgresServer
from tests.s3 import s3_server
from tests.test_haproxy import proxy

pytestmark = pytest.mark.slow
START_SECONDS = 300
SERVERS, VOTES = ("one", "two", "three"), ("votes", "more-votes")


class Replica:
    """A service of the file as a process, which listens on loopback."""

    def __init__(self, service: dict[str, Any], data_dir: Path, log: Path, environment: dict[str, str]) -> None:
        self.lines: SimpleQueue[str] = SimpleQueue()
        program, *command = service.get("command", ["server", "serve"])
        settings = {name: str(value) for name, value in service["environment"].items()} | environment
        command = [f"{program}.cli", *command, "--data-dir", str(data_dir), "--port", "0"]
        self.process = Process(command, log, self.lines.put, settings)
        self.metrics_port = int(self.hear("metrics on ").removesuffix("/metrics").rpartition(":")[2])
        ready = READY.match(self.hear("serving "))
        assert ready
        self.port = int(ready[1].rpartition(":")[2])

    def hear(self, start: str) -> str:
        """The next line of output that begins like this."""
        while not (line := self.lines.get(timeout=START_SECONDS)).startswith(start):
            pass
        return line


@contextmanager
def replicas(root: Path, folder: Path, pem: Pem, environment: dict[str, str]) -> Iterator[dict[str, Replica]]:
    services = yaml.safe_load((root / "deploy" / "compose.replicas.yaml").read_text())["services"]
    here = environment | {
        "PREFLOOP_HOST": "127.0.0.1",
        "PREFLOOP_METRICS_HOST": "127.0.0.1",
        "PREFLOOP_METRICS_PORT": "0",
        "PREFLOOP_TLS_CERT": str(pem.certificate),
        "PREFLOOP_TLS_KEY": str(pem.key),
        "PREFLOOP_COMPILE": "false",
        "PREFLOOP_POLL_SECONDS": "0.1",
    }
    running: dict[str, Replica] = {}
    with ExitStack() as stack:
        for name in (*SERVERS, *VOTES):
            # The file gives two of them one data directory.
            volume = services[name]["volumes"][0].partition(":")[0]
            running[name] = Replica(services[name], folder / volume, folder / f"{name}.log", here)
            stack.callback(running[name].process.stop)
        yield running


def test_three_servers_and_two_for_votes_behind_a_proxy(
    root: Path, tiny_model: Path, tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, pem = small_round(str(tiny_model)), make_pem(tmp_path, "server")
    with s3_server() as (_, variables):
        where = {
            **variables, "PREFLOOP_STORE_URL": postgres.create(migrated=False),
            "PREFLOOP_POLICY_URL": "s3://bucket/versions", "PREFLOOP_MODEL": str(tiny_model),
        }  # fmt: skip
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        with replicas(root, tmp_path, pem, where) as running:
            ports = [(each.port, each.metrics_port) for each in running.values()]
            with proxy(root, tmp_path, ports) as port:
                tls = Tls(ca=(tmp_path / "front.crt").read_bytes())
                with Client(f"localhost:{port}", user="voter", tls=tls) as client:
                    small.vote(client)
                    report = small.run(tmp_path / "learner")
                    assert report["state"] == "promoted", report["sentence"]
                    version = report["policy_version"]
                    assert len(client.active_policy().replicas) == 3
                    # A server is lost, and one that takes votes.
                    running["two"].process.kill()
                    running["votes"].process.kill()
                    started, *_, finished = client.chat("What is a lighthouse for?", max_tokens=8)
                    assert isinstance(started, ChatStarted)
                    assert isinstance(finished, ChatFinished)
                    assert finished.policy_version == version
                    client.thumb(started.response_id, THUMB_UP)
                    assert next(client.feedback()).response_id == started.response_id
