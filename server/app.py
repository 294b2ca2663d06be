"""The server's life: prepare, start, serve, stop.

Stopping is the reverse of starting: new calls are refused while open streams run on within the grace, then the answers
that were cut off are stored, then the engine and its process end, and the store is closed last.
"""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2, feedback_pb2_grpc, policy_pb2, policy_pb2_grpc

from server.adapter_policy import AdapterPolicy
from server.chat import ChatService
from server.engine import set_environment, start_engine
from server.errors import DataDirectoryError, ServiceError
from server.feedback import FeedbackService
from server.follower import Follower
from server.identity import LOOPBACK
from server.planner import Planner
from server.policies import PolicyService
from server.policy import Policy
from server.referee import Referee
from server.reference import prepare_reference
from server.settings import ServerSettings
from server.status import EdgeInterceptor
from server.store_thread import StoreThread
from server.validation import validator
from server.vllm_policy import VllmPolicy

log = logging.getLogger(__name__)

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = [
    descriptor.services_by_name[name].full_name
    for descriptor, name in (
        (chat_pb2.DESCRIPTOR, "ChatService"),
        (feedback_pb2.DESCRIPTOR, "FeedbackService"),
        (policy_pb2.DESCRIPTOR, "PolicyService"),
    )
]
OPTIONS = [
    # A second server on the port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # Clients may ping an idle connection every 30 seconds; gRPC's default is 5 minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class App:
    """The gRPC server over a store and, once started, a policy. Raises ServiceError where the port is taken."""

    def __init__(self, settings: ServerSettings, store: StoreThread) -> None:
        self._settings = settings
        self._store = store
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(interceptors=[EdgeInterceptor(validator(settings))], options=OPTIONS)
        # Before the engine starts, which takes a minute: a port in use should be known at once.
        self.port = self._bind()
        self._replica_id = f"{settings.host}:{self.port}"

    async def start(self, policy: Policy) -> None:
        """Serves the active version; health turns SERVING last."""
        settings, replica_id = self._settings, self._replica_id
        self._follower = Follower(policy, self._store, settings.data_dir, replica_id, settings.poll_seconds)
        self._planner = (
            Planner(settings.scoring_address, settings.scoring_seconds) if settings.scoring_address else None
        )
        self._referee = (
            Referee(self._store, self._follower, settings.duel_alpha, settings.duel_user_votes, settings.poll_seconds)
            if settings.serve_adapters and settings.duel_alpha
            else None
        )
        self._chat = ChatService(self._store, policy, settings, replica_id, self._planner, self._referee)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(self._chat, self._server)
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(FeedbackService(self._store), self._server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyService(self._store, self._follower), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        await self._store(lambda store: store.fail_interrupted_responses(replica_id))
        # Before the first user: a version that was activated while no server ran takes effect now.
        await self._follower.converge()
        self._tasks = [asyncio.create_task(self._follower.run()), asyncio.create_task(self._follower.beat())]
        self._tasks += [asyncio.create_task(self._referee.run())] if self._referee else []
        await self._server.start()
        self._tasks.append(asyncio.create_task(self._tell_health(policy)))

    async def stop(self, grace: float) -> None:
        """Refuses new calls, lets open streams run on for `grace` seconds, stores what was cut off."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)
        await self._chat.drain()
        if self._planner:
            await self._planner.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._follower.close()

    async def _tell_health(self, policy: Policy) -> None:
        """SERVING for as long as the engine is alive."""
        told = None
        while True:
            if policy.alive != told:
                told = policy.alive
                for service in ["", *SERVICES]:
                    await self._health.set(service, SERVING if told else NOT_SERVING)
            await asyncio.sleep(self._settings.poll_seconds)

    def _bind(self) -> int:
        try:
            port = self._server.add_insecure_port(f"{self._settings.host}:{self._settings.port}")
        except RuntimeError as error:
            raise ServiceError(
                f"{self._settings.host}:{self._settings.port} cannot be listened on, perhaps because another server "
                "does; choose another --port."
            ) from error
        return int(port)


async def serve(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Runs until SIGTERM or SIGINT. Raises ServiceError with what to do where it cannot start."""
    if settings.host not in LOOPBACK:
        raise ServiceError(
            f"--host {settings.host} would let anyone in: there are no keys and no TLS. Use 127.0.0.1, and a tunnel "
            "or a proxy that checks who calls."
        )
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    store = StoreThread(settings.data_dir)
    try:
        await _serve(settings, store, stopping, say)
    finally:
        await store.close()


async def _serve(
    settings: ServerSettings, store: StoreThread, stopping: asyncio.Event, say: Callable[[str], None]
) -> None:
    app = App(settings, store)
    set_environment(settings)
    directory = await asyncio.to_thread(_prepare, settings, say)
    await store(lambda store: store.registry.register_reference())
    say("starting the engine")
    # Always from the reference: compiled code is cached by the model's path. The active version is swapped in.
    policy = make_policy(settings, directory)
    try:
        await policy.start()
        await app.start(policy)
        # A quarter of a million objects of the libraries that never die: no collection need look at them again.
        gc.collect()
        gc.freeze()
        say(f"serving {policy.version} on {settings.host}:{app.port}")
        await stopping.wait()
        say("stopping: open streams may finish")
        await app.stop(settings.grace_seconds)
    finally:
        await policy.close()
        # The engine stands in reference cycles; collected as late as the interpreter's end, it complains.
        gc.unfreeze()
        gc.collect()


def make_policy(settings: ServerSettings, directory: Path) -> VllmPolicy:
    """An engine with the reference in `directory`, and what swaps versions in it."""
    start = partial(start_engine, settings, directory)
    if settings.serve_adapters:
        return AdapterPolicy(start, directory)
    return VllmPolicy(start, directory, keep_kv=settings.keep_kv_on_swap)


def _prepare(settings: ServerSettings, say: Callable[[str], None]) -> Path:
    try:
        return prepare_reference(settings.data_dir, settings.model, say)
    except OSError as error:
        raise DataDirectoryError(f"{str(settings.data_dir)!r} cannot be written ({error}).") from error
