"""The server's life: prepare, start, serve, stop.

Stopping is the reverse of starting: new calls are refused while open streams run on within the grace, then the answers
that were cut off are stored, then the engine and its process end, and the store is closed last.
"""

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2, feedback_pb2_grpc, policy_pb2, policy_pb2_grpc

from server.access import Access
from server.adapter_policy import AdapterPolicy
from server.chat import ChatService
from server.edge import Edge
from server.engine import set_environment, start_engine
from server.errors import DataDirectoryError, ServiceError
from server.feedback import FeedbackService
from server.follower import HEARTBEAT_SECONDS, Follower
from server.identity import LOOPBACK
from server.limits import Limits
from server.planner import Planner
from server.policies import PolicyService
from server.policy import Policy
from server.referee import Referee
from server.reference import prepare_reference
from server.repeat import repeat
from server.settings import ServerSettings
from server.store_thread import StoreThread
from server.tls import Certificates
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
    # Strangers: how long they may take to say hello, stay without a call, and what they may send in one.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 15 * 60_000),
    ("grpc.max_concurrent_streams", 1_000),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # A demonstration of the longest messages.
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
]


class App:
    """The gRPC server over a store and, once started, a policy. Raises ServiceError where the port is taken."""

    def __init__(self, settings: ServerSettings, store: StoreThread) -> None:
        self._settings = settings
        self._store = store
        self._access = Access(store, keys_needed=settings.host not in LOOPBACK)
        limits = Limits(settings.user_rate, settings.user_calls, settings.max_streams + settings.max_waiting)
        edge = Edge(self._access, limits, validator(settings), settings.call_seconds)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[edge],
            options=[*OPTIONS, ("grpc.max_allowed_incoming_connections", settings.max_connections)],
        )
        # Before the engine starts, which takes a minute: a port in use should be known at once.
        self.port = self._bind()
        self._replica_id = f"{settings.host}:{self.port}"
        self._tasks: list[asyncio.Task[NoReturn]] = []
        self._told: bool | None = None

    async def start(self, policy: Policy) -> None:
        """Serves the active version; health turns SERVING last."""
        settings, replica_id = self._settings, self._replica_id
        self._follower = Follower(policy, self._store, settings.data_dir, replica_id)
        self._planner = (
            Planner(settings.scoring_address, settings.scoring_seconds) if settings.scoring_address else None
        )
        self._referee = (
            Referee(self._store, self._follower, settings.duel_alpha, settings.duel_user_votes)
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
        await self._access.refresh()
        poll = settings.poll_seconds
        self._repeat(self._follower.follow, poll, "following the active policy failed")
        self._repeat(self._follower.report, HEARTBEAT_SECONDS, "the heartbeat could not be written")
        self._repeat(self._access.refresh, poll, "the keys could not be read")
        if self._referee:
            self._repeat(self._referee.look, poll, "the votes on two versions could not be looked at")
        await self._server.start()
        self._repeat(partial(self._tell_health, policy), poll, "health could not be told")

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

    def _repeat(self, work: Callable[[], Awaitable[object]], seconds: float, complaint: str) -> None:
        self._tasks.append(asyncio.create_task(repeat(work, seconds, complaint)))

    async def _tell_health(self, policy: Policy) -> None:
        """SERVING for as long as the engine is alive."""
        alive = policy.alive
        if alive != self._told:
            for service in ["", *SERVICES]:
                await self._health.set(service, SERVING if alive else NOT_SERVING)
            self._told = alive

    def _bind(self) -> int:
        settings, address = self._settings, f"{self._settings.host}:{self._settings.port}"
        try:
            if settings.tls_cert and settings.tls_key:
                certificates = Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
                port = self._server.add_secure_port(address, certificates.server_credentials())
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ServiceError(
                f"{address} cannot be listened on, perhaps because another server does; choose another --port."
            ) from error
        return int(port)


async def serve(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Runs until SIGTERM or SIGINT. Raises ServiceError with what to do where it cannot start."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    store = StoreThread(settings.data_dir)
    try:
        if settings.host not in LOOPBACK:
            credentials = await store(lambda store: store.keys.credentials())
            check_exposure(settings, has_key=bool(credentials.callers))
        await _serve(settings, store, stopping, say)
    finally:
        await store.close()


def check_exposure(settings: ServerSettings, *, has_key: bool) -> None:
    """Raises ServiceError where strangers could reach this server without TLS or without a key."""
    missing = [] if settings.tls_cert else ["a certificate with PREFLOOP_TLS_CERT and PREFLOOP_TLS_KEY"]
    missing += [] if has_key else ["a key, made by `server keys create --user NAME --role operator`"]
    if missing:
        raise ServiceError(
            f"--host {settings.host} lets strangers in, which needs TLS and keys. Missing: {' and '.join(missing)}. "
            "Or listen on 127.0.0.1."
        )


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
