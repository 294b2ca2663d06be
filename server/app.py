"""The gRPC server: its services over a store and a policy, and its background tasks.

Stopping reverses starting: new calls are refused, open streams may finish within the grace period, and interrupted
answers are stored. The engine and the store outlive the server (`server.process`).
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prefloop.v1 import (
    account_pb2,
    account_pb2_grpc,
    chat_pb2,
    chat_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    review_pb2,
    review_pb2_grpc,
)

from server.admin.retention_task import TIDY_SECONDS, RetentionTask
from server.engine.base import ServingEngine
from server.periodic import repeat_until_cancelled
from server.rpc.access import Access
from server.rpc.interceptor import Interceptor
from server.rpc.limits import Limits
from server.rpc.open_calls import OpenCalls
from server.rpc.scoring_client import ScoringClient
from server.rpc.services.account import AccountService
from server.rpc.services.chat import ChatService
from server.rpc.services.feedback import FeedbackService
from server.rpc.services.policies import PolicyService
from server.rpc.services.review import ReviewService
from server.rpc.tls import Certificates
from server.rpc.validation import validator
from server.settings import ServerSettings
from server.shared.errors import ServiceError
from server.shared.loopback import is_loopback
from server.store.store_thread import StoreThread
from server.telemetry import metrics
from server.telemetry.round_metrics import show_rounds
from server.turns.candidate_choice import CandidateChooser
from server.turns.turns import Turns
from server.versions.ab_test import AbTest
from server.versions.canary import CanaryWatch
from server.versions.follower import HEARTBEAT_SECONDS, Follower

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = [
    descriptor.services_by_name[name].full_name
    for descriptor, name in (
        (chat_pb2.DESCRIPTOR, "ChatService"),
        (feedback_pb2.DESCRIPTOR, "FeedbackService"),
        (review_pb2.DESCRIPTOR, "ReviewService"),
        (policy_pb2.DESCRIPTOR, "PolicyService"),
        (account_pb2.DESCRIPTOR, "AccountService"),
    )
]
PROBE_SECONDS = 0.5
SELDOM_SECONDS = 15.0
CONNECTION_SECONDS = 3600
OPTIONS = [
    # A second server on the port must fail, not share it.
    ("grpc.so_reuseport", 0),
    # Clients may ping an idle connection every 30 seconds; gRPC's default is 5 minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Limits for any peer: the time for the handshake, the time without a call, and the size of a call.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 15 * 60_000),
    ("grpc.max_concurrent_streams", 1_000),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # Fits a demonstration with the longest messages.
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
]


class App:
    """The gRPC server over a store and, once started, a policy. Raises ServiceError if the port is in use."""

    def __init__(self, settings: ServerSettings, store: StoreThread) -> None:
        self._settings = settings
        self._store = store
        self._access = Access(store, keys_needed=not is_loopback(settings.host))
        self._limits = Limits(
            settings.user_rate,
            settings.user_calls,
            settings.max_streams + settings.max_waiting,
            settings.application_calls,
        )
        self._calls = OpenCalls()
        edge = Interceptor(self._access, self._limits, self._calls, validator(settings), settings.call_seconds)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[edge],
            options=[
                *OPTIONS,
                ("grpc.max_allowed_incoming_connections", settings.max_connections),
                # A client that reads nothing keeps its calls open until its connection ends.
                ("grpc.max_connection_age_ms", CONNECTION_SECONDS * 1000),
                ("grpc.max_connection_age_grace_ms", int(settings.call_seconds * 1000) + 60_000),
            ],
        )
        metrics.ANSWERS_LIMIT.set(settings.max_streams)
        # Bind before the engine starts, which takes a minute, so that a port in use is reported at once.
        self.port = self._bind()
        # Not the address: in containers every server may listen on 0.0.0.0 and the same port.
        self._replica_id = f"{socket.gethostname()}:{self.port}"
        self._tasks: list[asyncio.Task[NoReturn]] = []
        self._told: bool | None = None

    async def start(self, engine: ServingEngine) -> None:
        """Start to serve the active version; health becomes SERVING last."""
        settings, replica_id = self._settings, self._replica_id
        self._follower = Follower(engine, self._store, settings.data_dir, replica_id, settings.hang_seconds)
        self._chooser = (
            CandidateChooser(
                ScoringClient(settings.scoring_address, settings.scoring_seconds),
                lambda version: self._store.read(lambda store: store.reward_models.reads(version, engine.reference)),
            )
            if settings.scoring_address
            else None
        )
        self._ab_test = (
            AbTest(
                self._store,
                self._follower,
                settings.ab_test_alpha,
                settings.ab_test_voters,
                settings.ab_test_user_votes,
            )
            if settings.serve_adapters and settings.ab_test_alpha
            else None
        )
        self._retention = RetentionTask(self._store, settings.data_dir, settings.retention_days)
        room, chooser, ab_test = self._limits.answering, self._chooser, self._ab_test
        self._turns = Turns(self._store, engine, settings, replica_id, room, chooser, ab_test)
        self._account = AccountService(self._store, self._access, self._calls, self._retention)
        self._add_services(engine)
        await self._store(lambda store: store.responses.fail_interrupted(replica_id, starting=True))
        # Before the first call: load a version that was activated while no server ran.
        await self._follower.converge()
        await self._access.refresh()
        poll = settings.poll_seconds
        self._repeat(self._follower.follow, poll, "following the active policy failed")
        self._repeat(self._follower.report, HEARTBEAT_SECONDS, "the heartbeat could not be written")
        self._repeat(self._access.refresh, poll, "the keys could not be read")
        self._repeat(partial(self._store, show_rounds), SELDOM_SECONDS, "the rounds' metrics could not be read")
        self._repeat(self._fail_interrupted, SELDOM_SECONDS, "answers of stopped servers could not be marked as failed")
        if settings.hang_seconds != 0:
            self._repeat(self._follower.probe, PROBE_SECONDS, "the engine could not be probed")
        self._repeat(self._retention.tidy, TIDY_SECONDS, "cleaning up after deletions failed")
        if self._ab_test:
            self._repeat(self._ab_test.look, poll, "the A/B test could not be evaluated")
        canary = CanaryWatch(self._store, self._follower)
        self._repeat(canary.look, poll, "the canary could not be decided about")
        await self._server.start()
        self._repeat(partial(self._tell_health, engine), poll, "health could not be reported")

    def _add_services(self, engine: ServingEngine) -> None:
        chat = ChatService(self._store, self._turns, self._retention)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(chat, self._server)
        feedback = FeedbackService(self._store, engine, self._settings.user_demonstrations)
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(feedback, self._server)
        review_pb2_grpc.add_ReviewServiceServicer_to_server(ReviewService(self._store), self._server)
        policies = PolicyService(self._store, self._follower, self._settings.data_dir, self._ab_test)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(policies, self._server)
        account_pb2_grpc.add_AccountServiceServicer_to_server(self._account, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give open streams `grace` seconds to finish, and store interrupted answers."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)
        await self._turns.drain()
        await self._account.drain()
        if self._chooser:
            await self._chooser.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._follower.close()

    @property
    def serving(self) -> bool:
        """Whether the health service reports SERVING."""
        return bool(self._told)

    async def _fail_interrupted(self) -> None:
        writing = self._turns.writing
        await self._store(lambda store: store.responses.fail_interrupted(self._replica_id, writing=writing))

    def _repeat(self, work: Callable[[], Awaitable[object]], seconds: float, complaint: str) -> None:
        self._tasks.append(asyncio.create_task(repeat_until_cancelled(work, seconds, complaint)))

    async def _tell_health(self, engine: ServingEngine) -> None:
        """Report SERVING while the engine is alive."""
        alive = engine.alive
        if alive != self._told:
            for service in ["", *SERVICES]:
                await self._health.set(service, SERVING if alive else NOT_SERVING)
            self._told = alive
            metrics.SERVING.set(alive)

    def _bind(self) -> int:
        settings, host = self._settings, self._settings.host
        address = f"{f'[{host}]' if ':' in host else host}:{settings.port}"
        try:
            if settings.tls_cert and settings.tls_key:
                certificates = Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
                port = self._server.add_secure_port(address, certificates.server_credentials())
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ServiceError(
                f"Cannot listen on {address}; another server may be using it. Choose another --port."
            ) from error
        return int(port)
