"""A canary on a running server: votes promote or reject it, also after a restart, and operators see how it stands."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefloop.v1 import policy_pb2

from server.store.e_value import CanaryResult
from server.store.learning.records import Canary
from server.store.store import Store
from server.versions.canary import decide
from tests.server.conftest import Running, publish_version, running_server
from tests.server.store.test_canaries import TERMS, begin, vote
from tests.server.versions.test_ab_test import until_active

CANARY = Canary("v0001", "v0000", "round_1", 20.0, 8, 1, 4, 0.0, 7.0)


@pytest.mark.parametrize(
    ("result", "expired", "outcome", "said"),
    [
        (CanaryResult((1.0,) * 8, 8), False, "promoted", "People prefer it to v0000: it won 1.00 of 8 choices"),
        (CanaryResult((0.0,) * 8, 8), False, "rejected", "People prefer v0000: it won 0.00 of 8 choices"),
        (
            CanaryResult((1.0, 0.0) * 4, 8),
            False,
            "rejected",
            "People have not decided between it and v0000, which stays",
        ),
        (CanaryResult((1.0,), 1), True, "rejected", "People have not decided"),
        (CanaryResult((1.0,) * 3, 3), False, None, ""),
    ],
)
def test_what_becomes_of_a_canary(result: CanaryResult, expired: bool, outcome: str | None, said: str) -> None:
    decided, reason = decide(CANARY, result, expired=expired)
    assert decided == outcome
    assert reason.startswith(said)


@pytest.mark.parametrize(
    ("wins", "level", "outcome"), [(60, 0.03, "promoted"), (59, 0.03, "rejected"), (60, 0.0, "rejected")]
)
def test_at_the_end_all_choices_decide_together(wins: int, level: float, outcome: str) -> None:
    canary = replace(CANARY, max_votes=100, last_level=level)
    result = CanaryResult((1.0,) * wins + (0.0,) * (100 - wins), 100)
    decided, reason = decide(canary, result, expired=False)
    assert decided == outcome
    said = "People prefer it to v0000: at the end, it won 0.60 of 100 choices, evidence that it is better 1.65"
    assert reason.startswith(said) == (outcome == "promoted")
    if outcome == "promoted":
        assert reason.endswith("; chance alone says as much for it once in 35 times.")


async def until_decided(running: Running) -> None:
    async with asyncio.timeout(10):
        while await running.store(lambda store: store.canaries.waiting()):
            await asyncio.sleep(0)


def votes(count: int, *, new: bool) -> Any:
    def cast(store: Store) -> None:
        for _ in range(count):
            vote(store, "ann", new=new)

    return cast


async def test_votes_promote_a_canary(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    canary = await running.store(begin)
    await running.store(votes(7, new=True))
    await until_active(running, "v0001")
    move, round_ = await running.store(lambda store: (store.lineage.moves(1)[0], store.rounds.get(canary.round_id)))
    assert (move.action, move.actor, move.version) == ("activate", "server", "v0001")
    assert move.reason.startswith("People prefer it to v0000: it won 1.00 of 7 choices")
    assert round_.state == "promoted"


async def test_votes_reject_a_canary_and_nothing_is_loaded(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(begin)
    await running.store(votes(7, new=False))
    await until_decided(running)
    assert running.engine.version == "v0000"
    version = await running.store(lambda store: store.policies.get("v0001"))
    assert version.state == "rejected"
    assert version.reason.startswith("People prefer v0000")


async def test_a_canary_whose_weights_cannot_be_served_is_rejected(running: Running) -> None:
    await running.store(begin)
    await running.store(votes(7, new=True))
    await until_decided(running)
    version = await running.store(lambda store: store.policies.get("v0001"))
    assert version.state == "rejected"
    assert version.reason.startswith("It cannot be served: ")


async def test_a_restarted_server_continues_the_wait(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running:
        publish_version(running.data_dir, "v0001")
        await running.store(begin)
        await running.store(votes(4, new=True))
    async with running_server(tmp_path) as running:
        await running.store(votes(3, new=True))
        await until_active(running, "v0001")


async def test_a_canary_that_an_engine_refuses_is_rejected_after_all(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    running.engine.bad.add("v0001")
    canary = await running.store(begin)
    await running.store(votes(7, new=True))
    async with asyncio.timeout(10):
        while (await running.store(lambda store: store.policies.get("v0001"))).state != "failed":
            await asyncio.sleep(0)
    round_ = await running.store(lambda store: store.rounds.get(canary.round_id))
    assert (round_.state, running.engine.version) == ("rejected", "v0000")
    assert round_.reason == "v0001 was activated and then reverted: v0001: a tensor is not finite"


async def test_the_wait_ends_at_its_limit_of_votes(running: Running) -> None:
    terms = replace(TERMS, max_votes=4)
    await running.store(lambda store: begin(store, terms=terms))
    for new in (True, False, True, False):
        await running.store(votes(1, new=new))
    await until_decided(running)
    version = await running.store(lambda store: store.policies.get("v0001"))
    assert version.reason.startswith("People have not decided between it and v0000, which stays")


async def test_operators_see_how_it_stands(running: Running) -> None:
    operator = (("x-user-id", "op"),)
    shown = await running.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), metadata=operator)
    assert not shown.HasField("canary")
    waiting = await running.store(begin)
    await running.store(votes(2, new=True))
    canary = (await running.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), metadata=operator)).canary
    assert (canary.version, canary.opponent_version, canary.round_id) == ("v0001", "v0000", waiting.round_id)
    assert (canary.votes, canary.max_votes, canary.evidence_needed) == (2, 200, 20.0)
    assert (canary.evidence_better, canary.evidence_worse) == (pytest.approx(2.669375), pytest.approx(0.219375))
    listed = await running.policies.ListPolicies(policy_pb2.ListPoliciesRequest(), metadata=operator)
    assert [policy.state for policy in listed.policies] == [
        policy_pb2.POLICY_STATE_CANARY, policy_pb2.POLICY_STATE_ACTIVE,
    ]  # fmt: skip
    rounds = await running.policies.ListRounds(policy_pb2.ListRoundsRequest(), metadata=operator)
    assert [round_.state for round_ in rounds.rounds] == [policy_pb2.ROUND_STATE_CANARY]
