"""A round whose policy is trained by two workers, each with an engine of its own, against a real server."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clients import Client
from clients.demo.voter import ask
from tests.e2e.conftest import children, live_server
from tests.e2e.small_rounds import SmallRound, command, small_round
from tests.ports import free_port

pytestmark = pytest.mark.e2e

RAY, INSTALL_SECONDS, START_SECONDS = "ray==2.60.0", 300, 120
WORKERS = {"PREFLOOP_WORKERS__COUNT": "2", "PREFLOOP_PPO__STEPS": "4"}


def assert_both_engines_sample_the_policy(report: dict[str, Any], count: int) -> None:
    """A weight that did not reach one of the engines would show in what it samples."""
    steps = report["metrics"]["improvement"]["steps"]
    assert [step["step"] for step in steps] == list(range(count))
    assert max(step["mismatch_rms"] for step in steps) < 0.005


def kill_after_two_steps(small: SmallRound, data_dir: Path) -> set[int]:
    """Kills a round while its workers train; returns their pids."""
    process = subprocess.Popen(
        command(data_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=small.environment(**WORKERS)
    )
    end = time.monotonic() + 300
    while not list(data_dir.glob("rounds/*/state-002")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    workers = children(process.pid)
    process.kill()
    process.wait()
    return workers


def test_a_round_by_two_workers_is_killed_and_resumed(tiny_model: Path, tmp_path: Path) -> None:
    small = small_round(str(tiny_model))
    with live_server(tmp_path, tiny_model) as live, Client(live.address, user="voter") as client:
        small.vote(client)
    workers = kill_after_two_steps(small, tmp_path)
    assert len(workers) >= 2
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end, "workers outlive their round"
        time.sleep(0.05)
    assert_both_engines_sample_the_policy(small.run(tmp_path, **WORKERS), 4)


@pytest.mark.slow
def test_what_two_workers_trained_is_served(tiny_model: Path, tmp_path: Path) -> None:
    small = small_round(str(tiny_model))
    steps = {"PREFLOOP_PPO__STEPS": str(small.steps)}
    with live_server(tmp_path, tiny_model) as live, Client(live.address, user="voter") as client:
        small.vote(client)
        report = small.run(tmp_path, **{**WORKERS, **steps})
        assert report["state"] == "promoted", report["sentence"]
        assert_both_engines_sample_the_policy(report, small.steps)
        live.hear(f"swapped to {report['policy_version']}")
        assert ask(client, "What is a lighthouse for?", max_tokens=8).policy_version == report["policy_version"]


@contextmanager
def ray_cluster(directory: Path) -> Iterator[dict[str, str]]:
    """The environment of a learner that can use it. Ray is installed beside our packages, whose versions are pinned."""
    packages = directory / "packages"
    uv = str(Path(sys.executable).with_name("uv"))
    where = ["--python", sys.executable, "--target", str(packages)]
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--no-deps", *where, RAY, "msgpack"],
        capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode and "Failed to fetch" in done.stderr:
        pytest.skip("no registry of Python packages here")
    assert done.returncode == 0, done.stderr
    port = free_port()
    environment = {
        "PYTHONPATH": str(packages),
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PREFLOOP_WORKERS__RAY": f"127.0.0.1:{port}",
    }
    start = ["--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={directory / 'ray'}"]
    program = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
    own = {**os.environ, **environment, "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(
        [sys.executable, "-c", program, "start", "--block", *start],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=own,
    ) as cluster:  # fmt: skip
        try:
            yield environment
        finally:
            cluster.terminate()


@pytest.mark.slow
def test_workers_are_actors_of_a_ray_cluster(
    tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = small_round(str(tiny_model))
    with (
        live_server(tmp_path, tiny_model) as live,
        Client(live.address, user="voter") as client,
        # A path of few letters: Ray puts sockets below it.
        ray_cluster(tmp_path_factory.mktemp("r")) as environment,
    ):
        small.vote(client)
        refused = subprocess.run(
            command(tmp_path), capture_output=True, text=True, timeout=START_SECONDS, check=False,
            env=small.environment(**WORKERS, **{**environment, "RAY_AUTH_TOKEN": "0" * 32}),
        )  # fmt: skip
        assert refused.returncode == 1
        assert "and that accepts this token" in refused.stderr
        assert_both_engines_sample_the_policy(small.run(tmp_path, **WORKERS, **environment), 4)
