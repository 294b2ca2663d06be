"""Two rounds on one service: the second version waits as a canary until people have chosen it over the first."""

import time
from pathlib import Path

import pytest
from prefloop.v1.feedback_pb2 import CHOICE_A, CHOICE_B
from prefloop.v1.policy_pb2 import POLICY_STATE_CANARY, ROUND_STATE_CANARY, ROUND_STATE_PROMOTED

from clients import Client
from clients.demo.voter import ask
from server.store.store import Store
from tests.e2e.conftest import live_server
from tests.e2e.small_rounds import small_round

pytestmark = pytest.mark.e2e

SECONDS = 60.0
MORE_VOTES = 40
# A second round starts from the active version, so that it cannot fail.
REVIEWED = {
    "PREFLOOP_POLICY__START_FROM": "active",
    "PREFLOOP_REVIEW__PAIRS": "12",
    "PREFLOOP_REVIEW__ACTIVE_PAIRS": "4",
}


def prefer(client: Client, store: Store, version: str) -> list[set[str]]:
    """Compares answers until none is left, always for the version; returns the versions of each pair."""
    compared = []
    while (found := client.review()).HasField("review"):
        comparison = store.responses.comparison("voter", found.review.comparison.comparison_id)
        client.choose(comparison.id, CHOICE_A if comparison.a.policy_version == version else CHOICE_B)
        compared.append({comparison.a.policy_version, comparison.b.policy_version})
    return compared


def test_the_second_version_is_promoted_by_people(tmp_path: Path, model: str) -> None:
    small = small_round(model)
    with live_server(tmp_path, model) as live, Client(live.address, user="voter") as client:
        small.vote(client)
        first = small.run(tmp_path, **REVIEWED)
        assert first["state"] == "promoted", first["sentence"]
        small.vote(client, first=small.votes, count=MORE_VOTES)
        second = small.run(tmp_path, **REVIEWED, PREFLOOP_GATE__CANARY="always")
        assert (second["state"], second["policy_version"]) == ("canary", "v0002"), second["sentence"]
        assert ask(client, "Still the first?", max_tokens=4).policy_version == "v0001"
        canary = client.active_policy().canary
        assert (canary.version, canary.opponent_version, canary.votes) == ("v0002", "v0001", 0)
        assert next(client.policies()).state == POLICY_STATE_CANARY
        assert next(client.rounds()).state == ROUND_STATE_CANARY
        assert small.run(tmp_path)["sentence"].startswith("v0002 waits as a canary")

        compared = prefer(client, Store.open(tmp_path), "v0002")
        # First what the canary waits for; then pairs to learn from, of the version that served as the round ended.
        assert (compared[0], compared[-1]) == ({"v0001", "v0002"}, {"v0001"})
        until_serving(client, "v0002")
        assert next(client.rounds()).state == ROUND_STATE_PROMOTED
        assert ask(client, "And now?", max_tokens=4).policy_version == "v0002"
        # Nothing is offered any more, and the choices are votes like any others.
        assert not client.review().HasField("review")
        assert sum(vote.HasField("choice") for vote in client.feedback()) > small.votes + MORE_VOTES


def until_serving(client: Client, version: str) -> None:
    end = time.monotonic() + SECONDS
    while [replica.loaded_version for replica in client.active_policy().replicas] != [version]:
        assert time.monotonic() < end
        time.sleep(0.1)
