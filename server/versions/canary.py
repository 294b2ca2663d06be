"""A canary becomes the served version, or is rejected, once people's choices between the two have decided.

Choices are read from the store, with the terms that the canary's round set, so that every server decides alike, also
after a restart. The first to decide has decided.
"""

import logging

from server.shared.errors import ConflictError, FailedPreconditionError
from server.store.learning.canaries import Outcome, decide
from server.store.learning.records import Canary
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.versions.follower import Follower

log = logging.getLogger(__name__)

ACTOR = "server"


class CanaryWatch:
    """Decides about the waiting canary. Its evidence is computed again only when there is a new vote."""

    def __init__(self, store: StoreThread, follower: Follower) -> None:
        self._store = store
        self._follower = follower
        self._seen: tuple[str, int] | None = None

    async def look(self) -> None:
        """Decide, if it is time. Call it repeatedly."""

        def read(store: Store) -> tuple[Canary, Outcome | None, str] | None:
            canary = store.canaries.waiting()
            # Another model's canary is decided about by servers that were started with it.
            if canary is None or not self._follower.can_load(store, store.policies.get(canary.version)):
                return None
            seen, expired = (canary.version, store.snapshots.watermark()), store.canaries.expired(canary)
            if seen == self._seen and not expired:
                return None
            outcome, reason = decide(canary, store.canaries.result(canary), expired=expired)
            # What was decided is tried again until it is done.
            self._seen = None if outcome else seen
            return canary, outcome, reason

        match await self._store(read):
            case Canary() as canary, "promoted", reason:
                await self._promote(canary, reason)
            case Canary() as canary, "rejected", reason:
                log.info("%s is rejected: %s", canary.version, reason)
                await self._store(lambda store: store.canaries.end(canary.version, "rejected", reason))

    async def _promote(self, canary: Canary, reason: str) -> None:
        log.info("%s is promoted: %s", canary.version, reason)

        def move(store: Store) -> None:
            # The move ends the canary, whoever makes it.
            store.policies.activate(
                canary.version, actor=ACTOR, reason=reason, expected_active_version=canary.opponent_version
            )

        try:
            await self._follower.activate(canary.version, move)
        except ConflictError as error:
            log.info("%s", error)
            # Nothing is left to decide; the version that is active says how it ended.
            moved = str(error)
            await self._store(lambda store: store.canaries.end(canary.version, "rejected", moved))
        except FailedPreconditionError as error:
            log.error("%s cannot be served: %s", canary.version, error)
            unloadable = f"It cannot be served: {error}"
            await self._store(lambda store: store.canaries.end(canary.version, "rejected", unloadable))
