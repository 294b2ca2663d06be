"""A server that kills itself at a failpoint while votes come in. Used by the tests and by `benchmarks/crash.py`."""

import asyncio
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2, feedback_pb2_grpc

from server.app import App
from server.settings import ServerSettings
from server.shared.failpoints import VARIABLE
from server.store.store_thread import StoreThread
from tests.server.conftest import publish_version
from tests.server.fakes import FakeEngine

SECONDS = 60
PROCESSES = multiprocessing.get_context("spawn")
ANN = (("x-user-id", "ann"),)


def serve(data_dir: Path, failpoint: str, parent: Connection) -> None:
    """Serve until killed; report the port once serving."""
    os.environ[VARIABLE] = failpoint

    async def run() -> None:
        store = StoreThread(data_dir)
        await store(lambda store: store.policies.register_reference())
        app = App(ServerSettings.load(data_dir=data_dir, port=0, max_tokens=20), store)
        await app.start(FakeEngine())
        parent.send(app.port)
        await asyncio.Event().wait()

    asyncio.run(run())


def vote_until_killed(data_dir: Path, failpoint: str, turns: int) -> tuple[dict[str, str], bool]:
    """The acknowledged votes as {feedback id: value}, and whether the failpoint killed the server before all were."""
    publish_version(data_dir, "v0000")
    ours, theirs = PROCESSES.Pipe()
    server = PROCESSES.Process(target=serve, args=(data_dir, failpoint, theirs))
    server.start()
    theirs.close()
    acknowledged: dict[str, str] = {}
    try:
        assert ours.poll(SECONDS)
        with grpc.insecure_channel(f"127.0.0.1:{ours.recv()}") as channel:
            chat, feedback = chat_pb2_grpc.ChatServiceStub(channel), feedback_pb2_grpc.FeedbackServiceStub(channel)
            for turn in range(turns):
                asked = chat_pb2.ChatRequest(message=f"question {turn}")
                started = next(iter(list(chat.Chat(asked, metadata=ANN, timeout=SECONDS)))).started
                for thumb in (feedback_pb2.THUMB_UP, feedback_pb2.THUMB_DOWN):
                    vote = feedback_pb2.SubmitThumbRequest(response_id=started.response_id, thumb=thumb)
                    given = feedback.SubmitThumb(vote, metadata=ANN, timeout=SECONDS).feedback
                    acknowledged[given.feedback_id] = feedback_pb2.Thumb.Name(given.thumb).removeprefix("THUMB_")
    except (EOFError, grpc.RpcError):
        server.join(SECONDS)
        return acknowledged, True
    finally:
        server.kill()
        server.join(SECONDS)
    return acknowledged, False
