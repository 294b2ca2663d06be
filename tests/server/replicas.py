"""Three servers on one store, with a fake engine or a real one, which are killed while people chat and vote.

`crowd` is a number of people, each in a thread, who go to another server when theirs breaks. What they were told is
compared with the store afterwards.
"""

import asyncio
import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import grpc
import uvloop
from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2, feedback_pb2_grpc

from server import process
from server.app import App
from server.settings import ServerSettings
from server.store.store_thread import StoreThread
from server.turns import answers
from tests.ports import free_port
from tests.server.fakes import FakeEngine

SECONDS = 60
START_SECONDS = 300
PROCESSES = multiprocessing.get_context("spawn")
ANSWER = "one two three four five six seven eight nine ten eleven twelve "
# Seconds between words, so that a kill finds answers half said.
PAUSE = 0.01


def serve(data_dir: Path, port: int, parent: Connection) -> None:
    """Serve until SIGTERM, with the grace that open streams have; report once serving."""

    answers.KEEP_SECONDS = PAUSE / 2

    async def run() -> None:
        store = StoreThread(data_dir)
        await store(lambda store: store.policies.register_reference())
        settings = ServerSettings.load(data_dir=data_dir, port=port, max_tokens=20, user_rate=1_000_000)
        app, engine, stopped = App(settings, store), FakeEngine(), asyncio.Event()
        engine.pause, engine.answer = PAUSE, ANSWER
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        await app.start(engine)
        parent.send(app.port)
        await stopped.wait()
        await app.stop(SECONDS)
        await store.close()

    asyncio.run(run())


def serve_model(data_dir: Path, port: int, parent: Connection) -> None:
    """The same with the real engine, and the model in the folder beside the data directory."""

    def say(line: str) -> None:
        if line.startswith("serving "):
            parent.send(port)

    answers.KEEP_SECONDS = PAUSE / 2
    settings = ServerSettings.load(
        data_dir=data_dir, port=port, model=str(data_dir.with_name("model")), max_tokens=16, user_rate=1_000_000,
        compile=False, metrics_port=0,
    )  # fmt: skip
    uvloop.run(process.serve(settings, say))


Serve = Callable[[Path, int, Connection], None]


class Servers:
    """Processes on ports of their own, which they keep when they are started again."""

    def __init__(self, data_dir: Path, serve: Serve = serve, number: int = 3) -> None:
        self._data_dir = data_dir
        self._serve = serve
        self._processes: dict[int, BaseProcess] = {}
        self.ports = [free_port() for _ in range(number)]

    def start(self, port: int) -> None:
        """Start one, and return once it serves."""
        ours, theirs = PROCESSES.Pipe()
        started = PROCESSES.Process(target=self._serve, args=(self._data_dir, port, theirs))
        started.start()
        theirs.close()
        assert ours.poll(START_SECONDS)
        assert ours.recv() == port
        self._processes[port] = started

    def kill(self, port: int) -> None:
        self._processes[port].kill()
        self._processes[port].join(SECONDS)

    def stop(self, port: int) -> None:
        """Stop one as an operator does; its streams go on to their end."""
        self._processes[port].terminate()
        self._processes[port].join(SECONDS)
        assert self._processes[port].exitcode == 0

    @contextmanager
    def running(self) -> Iterator["Servers"]:
        try:
            for port in self.ports:
                self.start(port)
            yield self
        finally:
            for each in self._processes.values():
                each.kill()
                each.join(SECONDS)


@dataclass
class Crowd:
    """What people were told, by all servers together."""

    # By feedback id, the value that was acknowledged last; and how many votes were acknowledged in all.
    votes: dict[str, str] = field(default_factory=dict)
    acknowledged: int = 0
    answers: dict[str, str] = field(default_factory=dict)
    # Response ids of streams that broke, with the code.
    broken: dict[str, grpc.StatusCode] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def chatting(self, ports: list[int], people: int) -> Iterator[None]:
        """Let people chat and vote while the block runs. Raises what went wrong for any of them."""
        with ThreadPoolExecutor(people) as pool:
            tasks = [pool.submit(self._person, f"user{number}", ports) for number in range(people)]
            try:
                yield
            finally:
                self.stopping.set()
                # What a person met is the cause of whatever came of it.
                for task in tasks:
                    task.result(SECONDS)

    def wait(self, enough: Callable[["Crowd"], bool], seconds: float) -> None:
        """Return once enough has happened. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not enough(self):
            if time.monotonic() > deadline or self.stopping.wait(0.05):
                raise TimeoutError(f"{self.acknowledged} votes, {len(self.answers)} answers, {len(self.broken)} broken")

    def _person(self, user: str, ports: list[int]) -> None:
        me, draw = (("x-user-id", user),), random.Random(user)
        channels = [grpc.insecure_channel(f"127.0.0.1:{port}") for port in ports]
        conversation = ""
        try:
            for turn in range(1_000_000):
                if self.stopping.is_set():
                    return
                started, text = self._chat(draw.choice(channels), me, conversation if turn % 3 else "")
                conversation = started.conversation_id if started else ""
                if started and text:
                    for thumb in (feedback_pb2.THUMB_UP, feedback_pb2.THUMB_DOWN):
                        self._vote(channels, draw, me, started.response_id, thumb, f"{turn}-{thumb}")
        except BaseException:
            self.stopping.set()
            raise
        finally:
            for channel in channels:
                channel.close()

    def _chat(
        self, channel: grpc.Channel, me: tuple[tuple[str, str], ...], conversation: str
    ) -> tuple[chat_pb2.ChatStarted | None, str]:
        request, started = chat_pb2.ChatRequest(message="hello there", conversation_id=conversation), None
        try:
            for event in chat_pb2_grpc.ChatServiceStub(channel).Chat(request, metadata=me, timeout=SECONDS):
                if event.HasField("started"):
                    started = event.started
                if event.HasField("finished"):
                    assert started
                    with self.lock:
                        self.answers[started.response_id] = event.finished.text
                    return started, event.finished.text
        except grpc.RpcError as error:
            if started:
                with self.lock:
                    self.broken[started.response_id] = error.code()
        return None, ""

    def _vote(
        self,
        channels: list[grpc.Channel],
        draw: random.Random,
        me: tuple[tuple[str, str], ...],
        response_id: str,
        thumb: feedback_pb2.Thumb,
        request_id: str,
    ) -> None:
        """Vote until a server acknowledges it, any of them."""
        request = feedback_pb2.SubmitThumbRequest(response_id=response_id, thumb=thumb, request_id=request_id)
        while not self.stopping.is_set():
            try:
                stub = feedback_pb2_grpc.FeedbackServiceStub(draw.choice(channels))
                given = stub.SubmitThumb(request, metadata=me, timeout=SECONDS).feedback
            except grpc.RpcError as error:
                # A call that arrives as a server stops is cancelled by gRPC; the Python client repeats it, too.
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
                self.stopping.wait(0.02)
                continue
            with self.lock:
                self.votes[given.feedback_id] = feedback_pb2.Thumb.Name(given.thumb).removeprefix("THUMB_")
                self.acknowledged += 1
            return
