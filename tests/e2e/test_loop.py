"""From votes to a new policy: a small round of the real learner against the real server.

The gate is set to accept almost anything, since a few votes prove nothing; its rejections are tested in tests/learner.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from clients import Client
from clients.demo.questions import questions
from clients.demo.voter import TASTES, Voter, ask, compare
from server.store.store import Store
from tests.e2e.conftest import LiveServer, live_server

pytestmark = pytest.mark.e2e

COMPARISONS = 150
SMALL = {
    # How long a killed learner keeps the next one waiting.
    "PREFLOOP_LEASE_SECONDS": "3",
    # Large, unrestrained steps, for a shift that sixteen prompts can show.
    "PREFLOOP_PPO__STEPS": "5",
    "PREFLOOP_PPO__EPISODES": "16",
    "PREFLOOP_PPO__SAVE_EVERY": "5",
    "PREFLOOP_PPO__LEARNING_RATE": "6e-4",
    "PREFLOOP_PPO__KL_COEF": "0.01",
    "PREFLOOP_PPO__KL_BUDGET": "100",
    "PREFLOOP_REWARD__REFERENCE_ANSWERS": "16",
    "PREFLOOP_GATE__SIGNAL_P": "1",
    "PREFLOOP_GATE__PROMPTS": "32",
    "PREFLOOP_GATE__REFITS": "100",
    "PREFLOOP_GATE__CONFIDENCE": "0.501",
    "PREFLOOP_GATE__CANARY": "off",
    "PREFLOOP_GATE__LENGTH_RANGE": "[0.01, 4]",
    "PREFLOOP_GATE__EMPTY_MARGIN": "1",
    "PREFLOOP_GATE__REPETITION_MARGIN": "1",
    "PREFLOOP_REVIEW__ACTIVE_PAIRS": "0",
}


def command(live: LiveServer, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "learner.cli", *arguments, "--json", "--data-dir", str(live.data_dir)]


def learner(live: LiveServer, *arguments: str) -> Any:
    result = subprocess.run(
        command(live, *arguments),
        capture_output=True, text=True, timeout=480, check=False, env={**os.environ, **SMALL},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def kill_after_two_steps(live: LiveServer) -> None:
    """Starts a round and kills it once its second PPO step is on disk."""
    process = subprocess.Popen(
        command(live, "run-once"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **SMALL}
    )
    end = time.monotonic() + 300
    while not list(live.data_dir.glob("rounds/*/state-002")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()


def test_votes_become_a_policy_that_serves(default: LiveServer) -> None:
    live = default
    assert learner(live, "run-once")["state"] == "nothing"
    with Client(live.address, user="voter") as client:
        voter = Voter(TASTES["short"], flip_rate=0.0, max_tokens=32, seed=0)
        cast = voter.vote_on(client, questions(0)[:COMPARISONS], concurrency=16, on_vote=lambda: None)
        assert cast.a_or_b + cast.ties == COMPARISONS
        kill_after_two_steps(live)
        report = learner(live, "run-once")
        assert report["state"] == "promoted", report["sentence"]
        assert [step["step"] for step in report["metrics"]["ppo"]["steps"]] == [0, 1, 2, 3, 4]
        # The engine must sample from the trainer's current weights at every step, at the service temperature, from the
        # whole distribution, and without cached keys and values of old weights. Any mistake would show here.
        assert max(step["mismatch_rms"] for step in report["metrics"]["ppo"]["steps"]) < 0.2
        assert report["metrics"]["ppo"]["steps"][0]["mismatch_rms"] < 0.1
        # Before its first update the trainer must reproduce pi_old; in bfloat16, where pi_old is its own, bit by bit.
        assert max(step["first_ratio_error"] for step in report["metrics"]["ppo"]["steps"]) < 1e-3
        version = report["policy_version"]
        active = client.active_policy()
        assert active.policy.version == version
        assert [replica.loaded_version for replica in active.replicas] == [version]
        assert ask(client, "What is a lighthouse for?", max_tokens=16).policy_version == version
        policy = next(policy for policy in client.policies() if policy.version == version)
        assert (policy.parent_version, policy.reference_version) == ("v0000", "v0000")
        assert policy.reward_model_version == report["reward_model_version"]
        again = learner(live, "run-once")
        assert (again["state"], again["sentence"].startswith("There are no new votes since")) == ("nothing", True)
        assert client.rollback().version == "v0000"
    store = Store.open(live.data_dir)
    [round_] = store.rounds.page()
    store.close()
    assert (round_.state, round_.stage, round_.policy_version) == ("promoted", "activate", version)
    assert round_.watermark == COMPARISONS
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
def test_the_newest_reward_model_chooses_what_is_compared(default: LiveServer) -> None:
    """Needs the reward model that the test above leaves."""
    live = default
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
