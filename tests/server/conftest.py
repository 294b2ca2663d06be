"""A real gRPC server on a free port over a real SQLite file; only the engine is a fake."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prefloop.v1 import account_pb2_grpc, chat_pb2_grpc, feedback_pb2_grpc, policy_pb2_grpc, review_pb2_grpc
from safetensors.numpy import save_file

from server.app import App
from server.settings import ServerSettings
from server.store.files.manifest import new_version
from server.store.store import Store
from server.store.store_thread import StoreThread
from tests.server.fakes import FakeEngine


@dataclass
class Running:
    """A server with the stubs of one channel to it."""

    engine: FakeEngine
    store: StoreThread
    app: Any
    data_dir: Path
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.chat: Any = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.feedback: Any = feedback_pb2_grpc.FeedbackServiceStub(self.channel)
        self.account: Any = account_pb2_grpc.AccountServiceStub(self.channel)
        self.policies: Any = policy_pb2_grpc.PolicyServiceStub(self.channel)
        self.reviews: Any = review_pb2_grpc.ReviewServiceStub(self.channel)
        self.stubs: Any = (self.chat, self.feedback, self.reviews, self.policies, self.account)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path)
    store.policies.register_reference()
    yield store
    store.close()


@asynccontextmanager
async def running_server(tmp_path: Path, **flags: Any) -> AsyncIterator[Running]:
    tmp_path.mkdir(exist_ok=True)
    if not (tmp_path / "policies" / "v0000").exists():
        publish_version(tmp_path, "v0000")
    store = StoreThread(tmp_path)
    await store(lambda store: store.policies.register_reference())
    # Tests that wait for something poll.
    usual = {
        "user_rate": 1_000_000,
        "data_dir": tmp_path,
        "port": 0,
        "max_tokens": 20,
        "max_message_chars": 500,
        "poll_seconds": 0.01,
    }
    settings = ServerSettings.load(**{**usual, **flags})
    app, engine = App(settings, store), FakeEngine()
    await app.start(engine)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        running = Running(engine, store, app, tmp_path, channel)
        try:
            yield running
        finally:
            # The test may have replaced the app.
            await running.app.stop(0)
            await store.close()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path) as running:
        yield running


def publish_version(data_dir: Path, version: str, tensors: dict[str, Any] | None = None) -> Path:
    """A version of two small tensors, registered nowhere."""
    final = data_dir / "policies" / version
    final.parent.mkdir(exist_ok=True)
    with new_version(final, kind="full", reference_version="v0000") as staging:
        save_file(
            tensors or {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}, staging / "model.safetensors"
        )
    return final


def register(store: Store, version: str, state: Any = "candidate") -> None:
    store.policies.register(
        version,
        kind="full",
        state=state,
        parent_version="v0000",
        reference_version="v0000",
        round_id=None,
        reward_model_version=None,
        metrics={"win_rate": 0.75},
    )
