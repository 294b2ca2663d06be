"""Servers on machines of their own, which share a store and a storage of versions."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefloop.v1 import policy_pb2

from server.store.files.manifest import verify
from server.store.files.sharing import share
from server.store.store import Store
from tests.server.conftest import Running, publish_version, register, running_server
from tests.server.rpc.test_rpcs import ANN

pytestmark = pytest.mark.parametrize("database", ["postgres"], indirect=True)
SECONDS = 30


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"file://{tmp_path}/shared"
    monkeypatch.setenv("PREFLOOP_POLICY_URL", url)
    return url


@pytest.fixture
async def two(tmp_path: Path, database: str, storage: str) -> AsyncIterator[tuple[Running, Running]]:
    async with running_server(tmp_path / "one") as one, running_server(tmp_path / "other") as other:
        yield one, other


def publish(running: Running, version: str) -> None:
    """As the learner does, on the machine of this server."""
    tensors = {"a": np.full((2, 3), float(version[1:]), np.float32), "b": np.ones(4, np.float32)}
    publish_version(running.data_dir, version, tensors)
    with closing(Store.open(running.data_dir)) as store:
        share(store, running.data_dir, "policies", version)
        register(store, version)


async def activate(running: Running, version: str) -> None:
    await running.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version=version), metadata=ANN)


async def until(running: Running, holds: Callable[[Any], bool]) -> None:
    """Return once this holds for the store's record of the server."""
    async with asyncio.timeout(SECONDS):
        while True:
            alive = await running.store(lambda store: store.replicas.alive())
            if any(one.id == running.app._replica_id and holds(one) for one in alive):
                return
            await running.app._follower.report()


async def test_a_server_fetches_what_another_machine_has_published(two: tuple[Running, Running]) -> None:
    one, other = two
    await asyncio.to_thread(publish, one, "v0001")
    await activate(one, "v0001")
    await until(other, lambda mine: mine.loaded_version == "v0001")
    assert verify(other.data_dir / "policies" / "v0001") == verify(one.data_dir / "policies" / "v0001")


async def test_a_version_that_cannot_be_fetched_now_is_not_to_blame(
    two: tuple[Running, Running], storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    await asyncio.to_thread(publish, one, "v0001")
    monkeypatch.setenv("PREFLOOP_POLICY_URL", "ftp://gone/x")
    await one.store(lambda store: store.policies.activate("v0001", actor="ann"))
    await until(other, lambda mine: "The shared storage ftp://gone/x cannot be used" in mine.error)
    assert other.engine.version == "v0000"
    assert (await one.store(lambda store: store.policies.active())).version == "v0001"
    monkeypatch.setenv("PREFLOOP_POLICY_URL", storage)
    await until(other, lambda mine: mine.loaded_version == "v0001" and not mine.error)


async def test_a_copy_that_was_damaged_here_is_fetched_again(two: tuple[Running, Running]) -> None:
    one, other = two
    await asyncio.to_thread(publish, one, "v0001")
    copy = publish_version(other.data_dir, "v0001")
    (copy / "model.safetensors").write_bytes(b"damaged")
    await activate(one, "v0001")
    await until(other, lambda mine: mine.loaded_version == "v0001")
    assert verify(copy) == verify(one.data_dir / "policies" / "v0001")
    assert (await one.store(lambda store: store.policies.get("v0001"))).state == "active"
