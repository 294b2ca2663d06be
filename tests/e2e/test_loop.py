"""From votes to a new policy: a small round of the real learner against the real server."""

import subprocess
import sys
import threading
import time
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
from clients.demo.voter import ask, compare
from server.store.files.manifest import verify
from server.store.store import Store
from tests.e2e.conftest import START_SECONDS, LiveServer, live_server
from tests.e2e.small_rounds import SmallRound, command, small_round
from tests.pem import Pem, make_pem
from tests.postgres import PostgresServer
from tests.s3 import s3_server
from tests.test_haproxy import proxy

pytestmark = pytest.mark.e2e

SERVERS, VOTES = ("one", "two", "three"), ("votes", "more-votes")


@pytest.fixture(scope="module")
def own(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server without votes or versions of other tests."""
    with live_server(tmp_path_factory.mktemp("loop"), model) as server:
        yield server


def kill_after_two_steps(small: SmallRound, data_dir: Path) -> None:
    """Starts a round and kills it once its second PPO step is on disk."""
    process = subprocess.Popen(
        command(data_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=small.environment()
    )
    end = time.monotonic() + 300
    while not list(data_dir.glob("rounds/*/state-002")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()


def test_votes_become_a_policy_that_serves(own: LiveServer) -> None:
    live, small = own, small_round(own.model)
    assert small.run(live.data_dir)["state"] == "nothing"
    with Client(live.address, user="voter") as client:
        small.vote(client)
        kill_after_two_steps(small, live.data_dir)
        report = small.run(live.data_dir)
        assert report["state"] == "promoted", report["sentence"]
        assert [step["step"] for step in report["metrics"]["improvement"]["steps"]] == list(range(small.steps))
        # The engine must sample from the trainer's current weights at every step, at the service temperature, from the
        # whole distribution, and without cached keys and values of old weights. Any mistake would show here.
        assert max(step["mismatch_rms"] for step in report["metrics"]["improvement"]["steps"]) < 0.2
        assert report["metrics"]["improvement"]["steps"][0]["mismatch_rms"] < 0.1
        # Before its first update the trainer must reproduce pi_old; in bfloat16, where pi_old is its own, bit by bit.
        assert max(step["first_ratio_error"] for step in report["metrics"]["improvement"]["steps"]) < 1e-3
        version = report["policy_version"]
        active = client.active_policy()
        assert active.policy.version == version
        assert [replica.loaded_version for replica in active.replicas] == [version]
        assert ask(client, "What is a lighthouse for?", max_tokens=16).policy_version == version
        policy = next(policy for policy in client.policies() if policy.version == version)
        assert (policy.parent_version, policy.reference_version) == ("v0000", "v0000")
        assert policy.reward_model_version == report["reward_model_version"]
        again = small.run(live.data_dir)
        assert (again["state"], again["sentence"].startswith("There are no new votes since")) == ("nothing", True)
        assert client.rollback().version == "v0000"
    store = Store.open(live.data_dir)
    [round_] = store.rounds.page()
    store.close()
    assert (round_.state, round_.stage, round_.policy_version) == ("promoted", "activate", version)
    assert round_.watermark == small.votes
    assert list((live.data_dir / "rounds" / round_.id).glob("events.out.tfevents.*"))


@contextmanager
def scores(live: LiveServer) -> Iterator[str]:
    """Runs `learner serve-scores`; yields its address."""
    arguments = ["serve-scores", "--data-dir", str(live.data_dir), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "learner.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    impatience = threading.Timer(120, process.kill)
    impatience.start()
    try:
        said = next((line for line in process.stdout or [] if line.startswith("serving scores on ")), "")
        assert said
        yield said.split()[-1]
    finally:
        process.terminate()
        assert process.wait(30) == 0
        impatience.cancel()


@pytest.mark.slow
def test_the_newest_reward_model_chooses_what_is_compared(own: LiveServer) -> None:
    """Needs the reward model that the test above leaves."""
    live = own
    store = Store.open(live.data_dir)
    newest = store.reward_models.newest("v0000")
    if newest is None:
        pytest.skip("there is no reward model: no round has run")
    with (
        scores(live) as address,
        # A second replica on the same data.
        live_server(
            live.data_dir, live.model, PREFLOOP_SCORING_ADDRESS=address, PREFLOOP_SCORING_SECONDS="60"
        ) as replica,
        Client(replica.address, user="planned") as client,
    ):
        comparison_id, _, _ = compare(client, "What is a lighthouse for?", max_tokens=16)
        comparison = store.responses.comparison("planned", comparison_id)
        assert {comparison.a.chosen_by, comparison.b.chosen_by} == {None, newest.version}
        assert sorted([comparison.a.temperature, comparison.b.temperature]) == [0.7, 1.0]
    store.close()


@pytest.mark.slow
def test_votes_at_two_servers_become_a_policy_that_both_serve(
    tiny_model: Path, tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers and a learner, each as on a machine of its own, on PostgreSQL and S3."""
    small, url = small_round(str(tiny_model)), postgres.create(migrated=False)
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    with s3_server() as (_, variables):
        for name, value in {**variables, "PREFLOOP_POLICY_URL": "s3://bucket/versions"}.items():
            monkeypatch.setenv(name, value)
        with live_server(tmp_path / "one", tiny_model) as one, live_server(tmp_path / "other", tiny_model) as other:
            with Client(f"{one.address},{other.address}", user="voter") as client:
                small.vote(client)
                report = small.run(tmp_path / "learner")
                assert report["state"] == "promoted", report["sentence"]
                version = report["policy_version"]
                for server in (one, other):
                    server.hear(f"swapped to {version}")
                replicas = client.active_policy().replicas
                assert {replica.loaded_version for replica in replicas} == {version}
                assert len(replicas) == 2
                # A server is lost with its machine. Another takes its calls, and a new one what it served.
                other.kill()
                assert ask(client, "What is a lighthouse for?", max_tokens=8).policy_version == version
            with live_server(tmp_path / "new", tiny_model) as new, Client(new.address, user="voter") as client:
                assert any(f"swapped to {version}" in line for line in new.log)
                assert ask(client, "What is a lighthouse for?", max_tokens=8).policy_version == version
        machines = ("one", "other", "new", "learner")
        kept = [verify(tmp_path / machine / "policies" / version).model_dump_json() for machine in machines]
        assert len(set(kept)) == 1


class Replica:
    """A service of `deploy/compose.replicas.yaml` as a process on loopback: its command and settings are the file's."""

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


@pytest.mark.slow
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
