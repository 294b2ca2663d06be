"""Canaries: versions that wait until choices on reviews decide whether they are served.

While one waits, whoever reads its round or its version sees the state `canary`; stored are `rejected` and `candidate`.
Its terms are stored with it, so that a server that restarts, or one of several, decides alike; whoever ends it first
has decided.
"""

from collections import defaultdict
from typing import Literal

from server.store.chats.reviews import withdraw_reviews
from server.store.database import Database
from server.store.e_value import CanaryResult, chance_of
from server.store.learning.leases import check_fence
from server.store.learning.lineage import Lineage
from server.store.learning.records import Canary, CanaryTerms, Lease

Outcome = Literal["promoted", "rejected"]
DAY_SECONDS = 86_400
WON = {"A": 1.0, "B": 0.0}


class Canaries:
    """Reads and writes of canaries."""

    def __init__(self, database: Database, lineage: Lineage) -> None:
        self._db = database
        self._lineage = lineage

    def begin(
        self, version: str, opponent_version: str, round_id: str, terms: CanaryTerms, *, fence: Lease | None = None
    ) -> None:
        """Let a registered candidate wait; an earlier canary must have ended."""
        with self._db.write():
            check_fence(self._db, fence)
            now = self._db.now()
            self._db.insert(
                "canaries",
                {
                    "version": version,
                    "opponent_version": opponent_version,
                    "round_id": round_id,
                    "evidence": terms.evidence,
                    "max_votes": terms.max_votes,
                    "unit": terms.unit,
                    "user_votes": terms.user_votes,
                    "last_level": terms.last_level,
                    "create_time": now,
                    "expire_time": now + terms.days * DAY_SECONDS,
                },
            )

    def find(self, version: str) -> Canary | None:
        """The version as a canary, waiting or decided; None if it never was one."""
        row = self._db.row("SELECT * FROM canaries WHERE version = ?", [version])
        return Canary(**row) if row else None

    def waiting(self) -> Canary | None:
        """The canary that is not decided yet."""
        return waiting_canary(self._db)

    def result(self, canary: Canary) -> CanaryResult:
        """What the votes say so far."""
        won, means = defaultdict[str, list[float]](list), list[float]()
        for vote in self._lineage.choices_between(
            canary.version, canary.opponent_version, canary.create_time, canary.user_votes
        ):
            share = WON.get(vote.value, 0.5)
            won[vote.user].append(share if vote.version_a == canary.version else 1 - share)
            if len(won[vote.user]) % canary.unit == 0:
                means.append(sum(won[vote.user][-canary.unit :]) / canary.unit)
        return CanaryResult(tuple(means), canary.unit * len(means))

    def expired(self, canary: Canary) -> bool:
        return self._db.now() >= canary.expire_time

    def end(self, version: str, outcome: Outcome, reason: str) -> bool:
        """End the wait, and tell the canary's round and version; False if it had ended already."""
        return end_canary(self._db, version, outcome, reason)


def decide(canary: Canary, result: CanaryResult, *, expired: bool) -> tuple[Outcome | None, str]:
    """What becomes of the canary, and why; None while votes are awaited."""
    if result.better >= canary.evidence:
        return "promoted", f"People prefer it to {canary.opponent_version}: {result}."
    if result.worse >= canary.evidence:
        return "rejected", f"People prefer {canary.opponent_version}: {result}."
    if result.votes >= canary.max_votes or expired:
        chance = chance_of(result.means)
        if chance <= canary.last_level and canary.last_level > 0:
            said = f"at the end, {result}; chance alone says as much for it once in {1 / chance:.0f} times"
            return "promoted", f"People prefer it to {canary.opponent_version}: {said}."
        return "rejected", f"People have not decided between it and {canary.opponent_version}, which stays: {result}."
    return None, str(result)


def waiting_canary(database: Database) -> Canary | None:
    row = database.row("SELECT * FROM canaries WHERE end_time IS NULL")
    return Canary(**row) if row else None


def end_canary(database: Database, version: str, outcome: Outcome, reason: str) -> bool:
    """See `Canaries.end`. Its pairs are no longer offered."""
    with database.write():
        ended = database.execute(
            f"UPDATE canaries SET end_time = {database.NOW}, outcome = ? WHERE version = ? AND end_time IS NULL",
            [reason, version],
        )
        if not ended:
            return False
        round_id = database.rows("SELECT round_id FROM canaries WHERE version = ?", [version])[0]["round_id"]
        database.execute(
            "UPDATE rounds SET state = ?, reason = ?, "
            f"finish_time = coalesce(finish_time, {database.NOW}) WHERE id = ?",
            [outcome, reason, round_id],
        )
        if outcome == "rejected":
            database.execute(
                "UPDATE policies SET state = 'rejected', reason = ? WHERE version = ? AND state = 'candidate'",
                [reason, version],
            )
        withdraw_reviews(database, "canary")
        return True
