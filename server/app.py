"""The server that answers: its services over a store and an engine, and its background tasks."""

import asyncio
import socket
from functools import partial

from server.admin.retention_task import TIDY_SECONDS
from server.engine.base import ServingEngine
from server.grpc_server import GrpcServer
from server.rpc.scoring_client import ScoringClient
from server.rpc.services.chat import ChatService
from server.rpc.services.policies import PolicyService
from server.settings import ServerSettings
from server.store.store_thread import StoreThread
from server.telemetry import metrics
from server.telemetry.round_metrics import show_disk, show_rounds
from server.turns.candidate_choice import CandidateChooser
from server.turns.turns import Turns
from server.versions.ab_test import AbTest
from server.versions.canary import CanaryWatch
from server.versions.follower import HEARTBEAT_SECONDS, Follower

PROBE_SECONDS = 0.5
SELDOM_SECONDS = 15.0


class App(GrpcServer):
    """The gRPC server over a store and, once started, a policy. Raises ServiceError if the port is in use."""

    def __init__(self, settings: ServerSettings, store: StoreThread) -> None:
        super().__init__(settings, store)
        # Not the address: in containers every server may listen on 0.0.0.0 and the same port.
        self._replica_id = f"{socket.gethostname()}:{self.port}"

    async def start(self, engine: ServingEngine) -> None:
        """Start to serve the active version; health becomes SERVING last."""
        settings, replica_id = self._settings, self._replica_id
        metrics.ANSWERS_LIMIT.set(settings.max_streams)
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
        room, chooser, ab_test = self._limits.answering, self._chooser, self._ab_test
        self._turns = Turns(self._store, engine, settings, replica_id, room, chooser, ab_test)
        await self._store(lambda store: store.responses.fail_interrupted(replica_id, starting=True))
        # Before the first call: load a version that was activated while no server ran.
        await self._follower.converge()
        poll = settings.poll_seconds
        self._repeat(self._follower.follow, poll, "following the active policy failed")
        self._repeat(self._follower.report, HEARTBEAT_SECONDS, "the heartbeat could not be written")
        self._repeat(partial(self._store, show_rounds), SELDOM_SECONDS, "the rounds' metrics could not be read")
        disk = partial(asyncio.to_thread, show_disk, settings.data_dir)
        self._repeat(disk, SELDOM_SECONDS, "the disk's size could not be read")
        self._repeat(self._fail_interrupted, SELDOM_SECONDS, "answers of stopped servers could not be marked as failed")
        if settings.hang_seconds != 0:
            self._repeat(self._follower.probe, PROBE_SECONDS, "the engine could not be probed")
        self._repeat(self._retention.tidy, TIDY_SECONDS, "cleaning up after deletions failed")
        if self._ab_test:
            self._repeat(self._ab_test.look, poll, "the A/B test could not be evaluated")
        canary = CanaryWatch(self._store, self._follower)
        self._repeat(canary.look, poll, "the canary could not be decided about")
        chat = ChatService(self._store, settings.system_prompt, self._turns, self._retention)
        policies = PolicyService(self._store, self._follower, settings.data_dir, self._ab_test)
        await self._open(chat, policies, engine)
        self._repeat(lambda: self._tell_health(engine.alive), poll, "health could not be reported")

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give open streams `grace` seconds to finish, and store interrupted answers."""
        await self._refuse(grace)
        await self._turns.drain()
        await self._account.drain()
        if self._chooser:
            await self._chooser.close()
        await self._end_tasks()
        await self._follower.close()

    async def _fail_interrupted(self) -> None:
        writing = self._turns.writing
        await self._store(lambda store: store.responses.fail_interrupted(self._replica_id, writing=writing))
