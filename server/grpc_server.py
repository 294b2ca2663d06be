"""The gRPC server by itself: what each call passes, which services there are, health, and background tasks.

Stopping reverses starting: new calls are refused, open streams may finish within the grace period, and interrupted
answers are stored. The store and the engine outlive the server (`server.process`).
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection
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

from server.admin.retention_task import RetentionTask
from server.engine.base import ModelText
from server.periodic import repeat_until_cancelled
from server.rpc.access import NEED_ENGINE, Access
from server.rpc.interceptor import Interceptor
from server.rpc.limits import Limits
from server.rpc.open_calls import OpenCalls
from server.rpc.services.account import AccountService
from server.rpc.services.feedback import FeedbackService
from server.rpc.services.review import ReviewService
from server.rpc.tls import Certificates
from server.rpc.validation import validator
from server.settings import ServerSettings
from server.shared.errors import ServiceError
from server.shared.loopback import is_loopback
from server.store.store_thread import StoreThread
from server.telemetry import metrics

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
CONNECTION_SECONDS = 3600
OPTIONS = [
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


class GrpcServer(ABC):
    """A gRPC server on a port. Raises ServiceError if the port is in use. A subclass says how it starts, ending with
    `_open`."""

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
        edge = Interceptor(
            self._access,
            self._limits,
            self._calls,
            validator(settings),
            settings.call_seconds,
            frozenset() if settings.engine else NEED_ENGINE,
        )
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[edge],
            options=[
                *OPTIONS,
                # Otherwise a second server on the port must fail.
                ("grpc.so_reuseport", int(settings.share_port)),
                ("grpc.max_allowed_incoming_connections", settings.max_connections),
                # A client that reads nothing keeps its calls open until its connection ends.
                ("grpc.max_connection_age_ms", CONNECTION_SECONDS * 1000),
                ("grpc.max_connection_age_grace_ms", int(settings.call_seconds * 1000) + 60_000),
            ],
        )
        # Bind before the engine starts, which takes a minute, so that a port in use is reported at once. A shared port
        # gets its part of the connections from then on, so not before they can be answered.
        self.port = settings.port if settings.share_port else self._bind()
        self._retention = RetentionTask(store, settings.data_dir, settings.retention_days)
        self._account = AccountService(store, self._access, self._calls, self._retention, settings.poll_seconds)
        self._tasks: list[asyncio.Task[NoReturn]] = []
        self._told: bool | None = None
        self._stopping = False

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """Refuse new calls, and give open ones `grace` seconds to finish."""

    async def _open(
        self,
        chat: chat_pb2_grpc.ChatServiceServicer,
        policies: policy_pb2_grpc.PolicyServiceServicer,
        text: ModelText,
    ) -> None:
        """Read the keys, and begin to take calls. `text` counts the tokens of what people write."""
        poll = self._settings.poll_seconds
        for read, complaint in (
            (self._access.refresh, "the keys could not be read"),
            (self._account.end_forgotten, "calls of users who were deleted elsewhere could not be ended"),
        ):
            await read()
            self._repeat(read, poll, complaint)
        feedback = FeedbackService(self._store, text, self._settings.user_demonstrations)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(chat, self._server)
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(feedback, self._server)
        review_pb2_grpc.add_ReviewServiceServicer_to_server(ReviewService(self._store), self._server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(policies, self._server)
        account_pb2_grpc.add_AccountServiceServicer_to_server(self._account, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        if self._settings.share_port:
            self.port = self._bind()
        await self._server.start()

    async def _refuse(self, grace: float) -> None:
        """Refuse new calls, and give open streams `grace` seconds to finish."""
        self._stopping = True
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    @property
    def serving(self) -> bool:
        """Whether the health service reports SERVING."""
        return bool(self._told) and not self._stopping

    def _repeat(self, work: Callable[[], Awaitable[object]], seconds: float, complaint: str) -> None:
        self._tasks.append(asyncio.create_task(repeat_until_cancelled(work, seconds, complaint)))

    async def _tell_health(self, alive: bool, services: Collection[str] = SERVICES) -> None:
        """Report whether these services, and so the server, serve."""
        if alive != self._told:
            for service in ["", *services]:
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
