"""A/B test of a new version against the previous one, until users' votes show which is better.

While the test is open, Compare draws its two answers from the two versions, at one temperature and blind. When the
evidence against the new one reaches 1 / alpha, the server rolls it back. The evidence is valid however often it is
checked (`server.store.e_value`), and is computed from the store alone, so a restarted server continues the test.
"""

import logging

from server.engine.base import SwapError
from server.shared.errors import ConflictError, FailedPreconditionError, ManifestError
from server.store.e_value import AbTestResult
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.versions.follower import Follower

log = logging.getLogger(__name__)

ACTOR = "server"


class AbTest:
    """Knows the two versions that Compare shows, and rolls back if the new one loses."""

    def __init__(self, store: StoreThread, follower: Follower, alpha: float, voters: int, user_votes: int) -> None:
        self._store = store
        self._follower = follower
        self._limit = 1 / alpha
        self._counted = voters, user_votes
        self._pair: tuple[str, str] | None = None
        # Versions that could not be loaded beside the active one or instead of it: logged once, not tried again.
        self._dead: set[str] = set()

    @property
    def pair(self) -> tuple[str, str] | None:
        """The active version and the previous one while the test is open and the active one is loaded: the pointer
        moves before the engine does, and back if a version cannot be loaded."""
        return self._pair if self._pair and self._pair[0] == self._follower.version else None

    def duel(self, store: Store) -> AbTestResult | None:
        """The result so far for the two versions that Compare shows; None while it shows one."""
        pair = self.pair
        found = store.lineage.duel(*self._counted) if pair else None
        # The active version may have changed since the last `look`.
        return found if found and (found.version, found.opponent) == pair else None

    async def look(self) -> None:
        """Count the votes, and roll back if the new version has lost. Call it repeatedly."""
        duel = await self._store(self._read)
        if duel is None or duel.won >= self._limit or duel.opponent in self._dead:
            self._pair = None
        elif duel.lost < self._limit:
            # `_live` also loads the opponent again after a restart.
            self._pair = (duel.version, duel.opponent) if await self._live(duel.opponent) else None
        else:
            self._pair = None
            reason = f"lost: {duel}"

            def go_back(store: Store) -> None:
                store.policies.activate(
                    duel.opponent, actor=ACTOR, action="rollback", reason=reason, expected_active_version=duel.version
                )

            log.warning("%s %s; rolling back", duel.version, reason)
            try:
                await self._follower.activate(duel.opponent, go_back)
            except ConflictError:
                log.info("somebody else changed the active version first")
            except FailedPreconditionError as error:
                log.error("cannot roll back to %s; %s stays active: %s", duel.opponent, duel.version, error)
                self._dead.add(duel.opponent)

    def _read(self, store: Store) -> AbTestResult | None:
        duel = store.lineage.duel(*self._counted)
        # Another model's versions are tested by servers that were started with it.
        known = duel and self._follower.can_load(store, store.policies.get(duel.version))
        return duel if known else None

    async def _live(self, version: str) -> bool:
        try:
            await self._follower.keep_live(version)
        except (ManifestError, SwapError, OSError) as error:
            log.warning("%s cannot be loaded beside the active version: %s", version, error)
            self._dead.add(version)
            return False
        return True
