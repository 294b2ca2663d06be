"""Two rounds on one service: the second version waits as a canary until people have chosen it over the first."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prefloop.v1.chat_pb2 import SLOT_A, SLOT_B, CompareFinished, CompareStarted
from prefloop.v1.feedback_pb2 import CHOICE_A, CHOICE_B, CHOICE_TIE
from prefloop.v1.policy_pb2 import POLICY_STATE_CANARY, ROUND_STATE_CANARY, ROUND_STATE_PROMOTED

from clients import Client
from clients.demo.many_calls import at_once
from clients.demo.voter import ask
from server.store.store import Store
from tests.e2e.conftest import live_server
from tests.e2e.test_loop import SMALL

pytestmark = pytest.mark.e2e

COMPARISONS = 300
SECONDS = 60.0
# Small steps from the active version, which the second round must not be able to fail.
LENIENT = {
    **SMALL,
    "PREFLOOP_PPO__STEPS": "24",
    "PREFLOOP_PPO__EPISODES": "64",
    "PREFLOOP_PPO__SAVE_EVERY": "12",
    "PREFLOOP_PPO__LEARNING_RATE": "1e-3",
    "PREFLOOP_PPO__APPROX_KL_STOP": "0.5",
    "PREFLOOP_PPO__PATIENCE": "24",
    "PREFLOOP_POLICY__START_FROM": "active",
    "PREFLOOP_REVIEW__PAIRS": "12",
    "PREFLOOP_REVIEW__ACTIVE_PAIRS": "4",
    "PREFLOOP_GATE__CANARY": "off",
}


def run_once(data_dir: Path, **settings: str) -> Any:
    result = subprocess.run(
        [sys.executable, "-m", "learner.cli", "run-once", "--json", "--data-dir", str(data_dir)],
        capture_output=True, text=True, timeout=480, check=False, env={**os.environ, **LENIENT, **settings},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def vote(client: Client, number: int) -> None:
    """Prefers the answer with more small letters."""
    answers = dict[int, str]()
    with client.compare(f"question {number}", max_tokens=16, seed=number) as stream:
        for event in stream:
            match event:
                case CompareStarted():
                    comparison_id = event.comparison_id
                case CompareFinished():
                    answers[event.slot] = event.text
    more = sum(map(str.islower, answers[SLOT_A])) - sum(map(str.islower, answers[SLOT_B]))
    client.choose(comparison_id, CHOICE_A if more > 0 else CHOICE_B if more < 0 else CHOICE_TIE)


def prefer(client: Client, store: Store, version: str) -> list[set[str]]:
    """Compares answers until none is left, always for the version; returns the versions of each pair."""
    compared = []
    while (found := client.review()).HasField("review"):
        comparison = store.responses.comparison("voter", found.review.comparison.comparison_id)
        client.choose(comparison.id, CHOICE_A if comparison.a.policy_version == version else CHOICE_B)
        compared.append({comparison.a.policy_version, comparison.b.policy_version})
    return compared


def test_the_second_version_is_promoted_by_people(tmp_path: Path, tiny_model: Path) -> None:
    with live_server(tmp_path, tiny_model) as live, Client(live.address, user="voter") as client:
        at_once(lambda number: vote(client, number), range(COMPARISONS), concurrency=8, on_result=lambda _: None)
        first = run_once(tmp_path)
        assert first["state"] == "promoted", first["sentence"]
        at_once(
            lambda number: vote(client, number),
            range(COMPARISONS, COMPARISONS + 40),
            concurrency=8,
            on_result=lambda _: None,
        )
        second = run_once(tmp_path, PREFLOOP_GATE__CANARY="always")
        assert (second["state"], second["policy_version"]) == ("canary", "v0002"), second["sentence"]
        assert ask(client, "Still the first?", max_tokens=4).policy_version == "v0001"
        canary = client.active_policy().canary
        assert (canary.version, canary.opponent_version, canary.votes) == ("v0002", "v0001", 0)
        assert next(client.policies()).state == POLICY_STATE_CANARY
        assert next(client.rounds()).state == ROUND_STATE_CANARY
        assert run_once(tmp_path)["sentence"].startswith("v0002 waits as a canary")

        compared = prefer(client, Store.open(tmp_path), "v0002")
        # First what the canary waits for; then pairs to learn from, of the version that served as the round ended.
        assert (compared[0], compared[-1]) == ({"v0001", "v0002"}, {"v0001"})
        until_serving(client, "v0002")
        assert next(client.rounds()).state == ROUND_STATE_PROMOTED
        assert ask(client, "And now?", max_tokens=4).policy_version == "v0002"
        # Nothing is offered any more, and the choices are votes like any others.
        assert not client.review().HasField("review")
        assert sum(vote.HasField("choice") for vote in client.feedback()) > COMPARISONS + 40


def until_serving(client: Client, version: str) -> None:
    end = time.monotonic() + SECONDS
    while [replica.loaded_version for replica in client.active_policy().replicas] != [version]:
        assert time.monotonic() < end
        time.sleep(0.1)
