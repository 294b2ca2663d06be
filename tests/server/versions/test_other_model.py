"""A server while a version of another model is active: it keeps what it has, and says what it needs."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prefloop.v1 import policy_pb2
from safetensors.numpy import save_file

from server.store.files.manifest import new_version
from server.store.store import Store
from tests.server.conftest import Running, publish_version, register, running_server
from tests.server.rpc.test_rpcs import ANN, chat, compare, refusal
from tests.server.store.test_canaries import begin as begin_canary
from tests.server.store.test_canaries import vote
from tests.server.telemetry.test_metrics import rise
from tests.server.versions.test_ab_test import activate

NEEDS = "v0002: made from another model; restart this server with --model 'my models/y'"


def publish_other(running: Running, version: str, reference: str = "v0002") -> None:
    """A version of another model, registered."""
    info = {"model": "my models/y"}
    final = running.data_dir / "policies" / version
    with new_version(final, kind="full", reference_version=reference, info=info) as staging:
        save_file({"c": np.zeros(7, np.float32)}, staging / "model.safetensors")


def register_other(store: Store, version: str) -> None:
    store.policies.register(
        version, kind="full", state="candidate", parent_version=None, reference_version="v0002", round_id=None,
        reward_model_version=None, metrics={},
    )  # fmt: skip


def make_active(version: str) -> Any:
    return lambda store: store.policies.activate(version, actor="operator", action="promote")


async def replica_error(running: Running) -> str:
    [replica] = await running.store(lambda store: store.replicas.alive())
    return str(replica.error)


async def until_it_says(running: Running, error: str) -> None:
    async with asyncio.timeout(10):
        while await replica_error(running) != error:
            await asyncio.sleep(0.01)


@pytest.fixture
async def waiting(running: Running) -> Running:
    """A server with v0001 of its model, while v0002 of another one is active."""
    publish_version(running.data_dir, "v0001")
    publish_other(running, "v0002")
    await running.store(lambda store: [register(store, "v0001"), register_other(store, "v0002")])
    await activate(running, "v0001")
    await running.store(make_active("v0002"))
    await until_it_says(running, NEEDS)
    return running


async def test_it_serves_what_it_has_and_marks_nothing_as_failed(waiting: Running) -> None:
    swaps = waiting.engine.swaps
    await asyncio.sleep(0.1)
    assert (waiting.engine.version, waiting.engine.swaps) == ("v0001", swaps)
    assert (await chat(waiting))[0].started.policy_version == "v0001"
    states = await waiting.store(lambda store: [store.policies.get(v).state for v in ("v0001", "v0002")])
    assert states == ["retired", "active"]
    reply = await waiting.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), metadata=ANN)
    assert (reply.policy.version, reply.replicas[0].loaded_version, reply.replicas[0].error) == (
        "v0002",
        "v0001",
        NEEDS,
    )


async def test_it_says_so_once(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    publish_other(running, "v0002")
    with rise("prefloop_swaps_total", 1, result="refused"):
        await running.store(lambda store: register_other(store, "v0002"))
        await running.store(make_active("v0002"))
        await until_it_says(running, NEEDS)
        await asyncio.sleep(0.1)
    assert [record.message for record in caplog.records if "restart" in record.message] == [
        f"v0000 stays loaded. {NEEDS}"
    ]


async def test_it_follows_again_once_its_own_model_is_active(waiting: Running) -> None:
    await waiting.store(make_active("v0001"))
    await until_it_says(waiting, "")
    await waiting.store(make_active("v0002"))
    await until_it_says(waiting, NEEDS)
    await waiting.store(make_active("v0000"))
    await until_it_says(waiting, "")
    assert waiting.engine.version == "v0000"


@pytest.mark.parametrize("rpc", ["ActivatePolicy", "RollbackPolicy"])
async def test_no_call_to_it_moves_the_pointer_to_another_model(waiting: Running, rpc: str) -> None:
    await waiting.store(make_active("v0001"))
    await until_it_says(waiting, "")
    request = getattr(policy_pb2, f"{rpc}Request")(version="v0002")
    assert await refusal(getattr(waiting.policies, rpc)(request, metadata=ANN)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "v0002 was made from another model, 'my models/y', which this server cannot load. Make it the active version "
        "with `learner rollback v0002`, then restart the servers with --model 'my models/y'.",
        ["OTHER_MODEL"],
    )
    assert await waiting.store(lambda store: store.policies.active().version) == "v0001"


async def test_a_canary_of_another_model_waits_for_a_server_that_can_load_it(running: Running) -> None:
    def begin(store: Store) -> None:
        begin_canary(store)
        store._db.execute("UPDATE policies SET origin_version = 'v0002' WHERE version = 'v0001'")  # type: ignore[attr-defined]
        for _ in range(7):
            vote(store, "ann", new=True)

    publish_version(running.data_dir, "v0001")
    await running.store(begin)
    await asyncio.sleep(0.1)
    assert (await running.store(lambda store: store.canaries.waiting())).version == "v0001"
    assert await running.store(lambda store: store.policies.get("v0001").state) == "canary"


async def test_versions_of_two_models_are_not_shown_side_by_side(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True) as running:
        publish_other(running, "v0002")
        await running.store(lambda store: register_other(store, "v0002"))
        await running.store(make_active("v0002"))
        await until_it_says(running, NEEDS)
        assert await running.store(lambda store: store.lineage.duel(10, 10)) is None
        # Nor are two versions of the other model.
        publish_other(running, "v0003")
        await running.store(lambda store: register_other(store, "v0003"))
        await running.store(make_active("v0003"))
        await until_it_says(running, NEEDS.replace("v0002", "v0003"))
        assert await running.store(lambda store: store.lineage.duel(10, 10)) is not None
        await asyncio.sleep(0.1)
        assert running.engine.live == set()
        before = len(running.engine.pinned)
        await compare(running)
        assert running.engine.pinned[before:] == [None, None]


async def test_another_reference_of_the_same_model_is_loaded_without_a_restart(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(
        lambda store: store.policies.register(
            "v0001", kind="full", state="candidate", parent_version="v0000", reference_version="v0001", round_id=None,
            reward_model_version=None, metrics={},
        )
    )  # fmt: skip
    await running.store(make_active("v0001"))
    async with asyncio.timeout(10):
        while running.engine.version != "v0001":
            await asyncio.sleep(0.01)
    assert await replica_error(running) == ""
    assert (await chat(running))[0].started.policy_version == "v0001"
