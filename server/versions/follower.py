"""Makes this server serve the version at the store's pointer, and reports what it serves. Restarts a dead engine.

A version that cannot be loaded is marked as failed, the pointer goes back to the version loaded here, and the reason is
in the store and in the status of the RPC that asked for it.

An engine loads only versions of one lineage, that of the model that it was started with. While the active version is
of another lineage, this server keeps what it has loaded, and reports that it must be restarted.
"""

import asyncio
import logging
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from server.engine.base import ServingEngine, SwapError
from server.shared.errors import FailedPreconditionError, ManifestError, UnavailableError
from server.store.files.manifest import made_from
from server.store.files.sharing import fetch, is_shared, locally
from server.store.learning.records import PolicyVersion
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.telemetry.metrics import ACTIVE_POLICY, ENGINE_HANGS, ENGINE_RESTARTS, SWAPS

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0


class Follower:
    """Owns the served version; nothing else calls `ServingEngine.swap`."""

    def __init__(
        self, engine: ServingEngine, store: StoreThread, data_dir: Path, replica_id: str, hang_seconds: float | None
    ) -> None:
        self._engine = engine
        self._store = store
        self._data_dir = data_dir
        self._replica_id = replica_id
        self._hang_seconds = hang_seconds
        self._converging = asyncio.Lock()
        self._error = ""
        # The active version, while it is of another lineage.
        self._unloadable = ""
        # Swaps whose callers may have left; the event loop holds only weak references to tasks.
        self._swaps: set[asyncio.Task[bool]] = set()

    @property
    def version(self) -> str:
        """The version that is loaded, whatever the store's pointer says."""
        return self._engine.version

    def can_load(self, store: Store, policy: PolicyVersion) -> bool:
        """Whether the version is of the model that the engine was started with."""
        return store.policies.get(self._engine.reference).origin_version == policy.origin_version

    async def follow(self) -> None:
        """Restart a dead engine, and load the active version. Call it repeatedly."""
        if not self._engine.alive:
            await self._revive()
        if await self.converge():
            await self.report()

    async def converge(self) -> bool:
        """Load the active version if it is not loaded; True if something changed, including a failure."""
        async with self._converging:
            policy, known = await self._store(lambda store: self._look_up(store, store.policies.active().version))
            if not known:
                return await self._wait_for_restart(policy)
            returned, self._unloadable = bool(self._unloadable), ""
            active = policy.version
            if active != self._engine.version or returned:
                self._error = ""
            if active == self._engine.version:
                return returned
            try:
                directory = await self._locate(active)
                await self._engine.swap(active, directory)
                SWAPS.labels("done").inc()
            except UnavailableError as error:
                # The version is not to blame: it is tried again.
                log.warning("%s stays loaded: %s", self._engine.version, error)
                self._error = f"{active}: {error}"
            except (ManifestError, SwapError, OSError, TimeoutError) as error:
                reason, loaded = str(error) or type(error).__name__, self._engine.version
                log.error("%s cannot be served; %s stays loaded: %s", active, loaded, reason)
                self._error = f"{active}: {reason}"
                SWAPS.labels("refused").inc()
                await self._store(lambda store: store.policies.fail(active, reason, loaded))
            return True

    async def activate(self, version: str, move_pointer: Callable[[Store], object]) -> None:
        """Check `version`, move the pointer, and return once it is served here.

        Raises FailedPreconditionError with the reason. The pointer was then not moved, or it is back because the engine
        could not load `version`, or somebody else has moved it since.
        """
        policy, known = await self._store(lambda store: self._look_up(store, version))
        if not known:
            raise FailedPreconditionError("OTHER_MODEL", await self._other_model(policy))
        try:
            await self._locate(version)
        except (ManifestError, OSError) as error:
            raise FailedPreconditionError("POLICY_UNLOADABLE", str(error)) from error
        await self._store(move_pointer)
        # A caller that disconnects must not interrupt a swap.
        await asyncio.shield(self._keep(asyncio.create_task(self.converge())))
        await self.report()
        if self._engine.version != version:
            raise FailedPreconditionError("POLICY_UNLOADABLE", self._error or f"{version} has been replaced since.")

    async def _locate(self, version: str) -> Path:
        """The directory to load a version from, fetched from shared storage if it is not here, and once more if what is
        here is damaged. Raises ManifestError, OSError and UnavailableError."""
        await asyncio.to_thread(locally, self._data_dir, partial(fetch, version=version))
        try:
            return await asyncio.to_thread(self._engine.locate, self._data_dir, version)
        except ManifestError:
            if not is_shared():
                raise
            await asyncio.to_thread(locally, self._data_dir, partial(fetch, version=version, again=True))
            return await asyncio.to_thread(self._engine.locate, self._data_dir, version)

    def _look_up(self, store: Store, version: str) -> tuple[PolicyVersion, bool]:
        """A version, and whether it can be loaded."""
        policy = store.policies.get(version)
        return policy, self.can_load(store, policy)

    async def _wait_for_restart(self, active: PolicyVersion) -> bool:
        """Keep what is loaded, since this engine cannot load the active version; True if that is news."""
        if self._unloadable == active.version:
            return False
        self._unloadable = active.version
        model = shlex.quote(await self._model(active))
        self._error = f"{active.version}: made from another model; restart this server with --model {model}"
        log.warning("%s stays loaded. %s", self._engine.version, self._error)
        SWAPS.labels("refused").inc()
        return True

    async def _other_model(self, policy: PolicyVersion) -> str:
        model = shlex.quote(await self._model(policy))
        return (
            f"{policy.version} was made from another model, {model}, which this server cannot load. Make it the active "
            f"version with `learner rollback {policy.version}`, then restart the servers with --model {model}."
        )

    async def _model(self, policy: PolicyVersion) -> str:
        return await asyncio.to_thread(made_from, self._data_dir / "policies" / policy.origin_version)

    async def probe(self) -> None:
        """Kill an engine that hangs, so that `follow` restarts it. Call it repeatedly."""
        if reason := self._engine.probe(self._hang_seconds):
            log.error("%s; it was killed", reason)
            ENGINE_HANGS.inc()

    async def _revive(self) -> None:
        async with self._converging:
            # A swap may have restarted it meanwhile, or be the reason.
            if not self._engine.alive:
                ENGINE_RESTARTS.inc()
                log.error("the engine died; starting it again with %s", self._engine.version)
                await self._engine.revive()

    async def keep_live(self, version: str) -> None:
        """Make `version` answer beside the active one, if the engine supports it."""
        await self._engine.keep_live(version, await self._locate(version))

    async def close(self) -> None:
        """Remove this server from the store's replicas."""
        await self._store(lambda store: store.replicas.remove(self._replica_id))

    def _keep(self, task: asyncio.Task[bool]) -> asyncio.Task[bool]:
        self._swaps.add(task)
        task.add_done_callback(self._swaps.discard)
        return task

    async def report(self) -> None:
        """Report to the store that this server is alive and what it serves, also during a swap or an engine restart."""
        loaded, error = self._engine.version, self._error
        ACTIVE_POLICY.clear()
        ACTIVE_POLICY.labels(loaded).set(1)
        await self._store(lambda store: store.replicas.report(self._replica_id, loaded, error))
