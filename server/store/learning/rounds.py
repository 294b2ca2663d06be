"""Rounds and their stages. Every write of a round takes its lease."""

import json
from collections.abc import Iterable
from typing import Any, Literal

from server.shared import stored_round
from server.shared.errors import ConflictError, NotFoundError
from server.store.database import UNLIMITED, Database, Row, newest_rows
from server.store.ids import new_id
from server.store.learning.canaries import waiting_canary
from server.store.learning.leases import check_fence
from server.store.learning.policies import ACTIVE_REFERENCE, Policies
from server.store.learning.records import Lease, Round, RoundKind
from server.store.learning.round_metrics import RoundMetrics


class Rounds:
    """Reads and writes of rounds."""

    def __init__(self, database: Database, policies: Policies) -> None:
        self._db = database
        self._policies = policies

    def create(
        self,
        watermark: int,
        settings: dict[str, Any],
        *,
        reference_version: str,
        quarantined: Iterable[str] = (),
        judge: str = "",
        machine_watermark: int = 0,
        kind: RoundKind = "alignment",
        fence: Lease,
    ) -> Round:
        """Begin a round from the active policy and the votes up to `watermark`, except those of `quarantined` users.
        Raises ConflictError if the active policy has another reference by now."""
        with self._db.write():
            check_fence(self._db, fence)
            active = self._policies.active()
            if active.reference_version != reference_version:
                raise ConflictError(f"{active.version} of another reference is active since; nothing was changed.")
            round_id = new_id("round")
            self._db.insert(
                "rounds",
                {
                    "id": round_id,
                    "state": "running",
                    "stage": "snapshot",
                    "watermark": watermark,
                    "incumbent_version": active.version,
                    "reference_version": reference_version,
                    "settings": stored_round.SETTINGS.dump(settings),
                    "attempts": 1,
                    "quarantined": json.dumps(sorted(quarantined)),
                    "judge": judge,
                    "machine_watermark": machine_watermark,
                    "kind": kind,
                    "create_time": self._db.now(),
                },
            )
            return self.get(round_id)

    def update(
        self,
        round_id: str,
        *,
        fence: Lease,
        stage: str | None = None,
        metrics: RoundMetrics | None = None,
        policy_version: str | None = None,
        reward_model_version: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Round:
        """Record a finished stage; `metrics` are merged into the stored ones, `settings` replace them."""
        with self._db.write():
            check_fence(self._db, fence)
            old = self.get(round_id)
            self._db.execute(
                "UPDATE rounds SET stage = ?, metrics = ?, policy_version = ?, reward_model_version = ?, settings = ? "
                "WHERE id = ?",
                [
                    stage or old.stage,
                    stored_round.METRICS.dump((old.metrics | (metrics or RoundMetrics())).to_json()),
                    policy_version or old.policy_version,
                    reward_model_version or old.reward_model_version,
                    stored_round.SETTINGS.dump(settings or old.settings),
                    round_id,
                ],
            )
            return self.get(round_id)

    def resume(self, round_id: str, *, fence: Lease) -> Round:
        """Count one more attempt for a round that is resumed."""
        return self._count_attempts(round_id, 1, fence)

    def stop(self, round_id: str, *, fence: Lease) -> Round:
        """Do not count the attempt of a round that stops on request."""
        return self._count_attempts(round_id, -1, fence)

    def finish(
        self,
        round_id: str,
        state: Literal["promoted", "rejected", "failed"],
        *,
        reason: str = "",
        fence: Lease | None = None,
    ) -> Round:
        """End a running round; one that has ended, as its canary was decided, stays as it is."""
        with self._db.write():
            check_fence(self._db, fence)
            self._db.execute(
                "UPDATE rounds SET state = ?, reason = ?, finish_time = ? WHERE id = ? AND state = 'running'",
                [state, reason, self._db.now(), round_id],
            )
            return self.get(round_id)

    def get(self, round_id: str) -> Round:
        row = self._db.row("SELECT * FROM rounds WHERE id = ?", [round_id])
        if row is None:
            raise NotFoundError("round", round_id)
        return self._rounds([row])[0]

    def running(self) -> Round | None:
        """The round to resume, or None."""
        row = self._db.row("SELECT * FROM rounds WHERE state = 'running' ORDER BY create_time DESC LIMIT 1")
        return next(iter(self._rounds([row] if row else [])), None)

    def last_learned(self) -> Round | None:
        """The newest round of the active version's reference that learned from votes and was promoted or rejected, or
        None: what another one learned is new to this one."""
        row = self._db.row(
            "SELECT * FROM rounds WHERE state IN ('promoted', 'rejected') AND kind = 'alignment' "
            f"AND reference_version = ({ACTIVE_REFERENCE}) ORDER BY rowid DESC LIMIT 1"
        )
        return next(iter(self._rounds([row] if row else [])), None)

    def last_fine_tuned(self) -> Round | None:
        """The newest round of the active version's model that learned from demonstrations, or tried to; None if there
        is none. A running one does not count."""
        row = self._db.row(
            "SELECT * FROM rounds WHERE state != 'running' AND kind = 'sft' AND reference_version IN "
            "(SELECT version FROM policies WHERE origin_version = (SELECT origin_version FROM pointer "
            "JOIN policies USING (version))) ORDER BY rowid DESC LIMIT 1"
        )
        return next(iter(self._rounds([row] if row else [])), None)

    def page(self, limit: int = UNLIMITED, before: str | None = None) -> list[Round]:
        """Newest first; `before` is the round after which the page starts."""
        return self._rounds(newest_rows(self._db, "rounds", "id", limit, before))

    def count(self) -> dict[str, int]:
        """How many rounds there were in each state; zero counts are left out."""
        return {
            row["state"]: row["n"] for row in self._db.rows("SELECT state, count(*) AS n FROM rounds GROUP BY state")
        }

    def _count_attempts(self, round_id: str, by: int, fence: Lease) -> Round:
        with self._db.write():
            check_fence(self._db, fence)
            self._db.execute("UPDATE rounds SET attempts = attempts + ? WHERE id = ?", [by, round_id])
            return self.get(round_id)

    def _rounds(self, rows: Iterable[Row]) -> list[Round]:
        canary = waiting_canary(self._db)
        return [_round(row, waits=canary is not None and canary.round_id == row["id"]) for row in rows]


def _round(row: Row, *, waits: bool) -> Round:
    stored = {
        # A round whose canary waits is stored as rejected, until that is promoted.
        "state": "canary" if waits and row["state"] == "rejected" else row["state"],
        "settings": stored_round.SETTINGS.load(row["settings"]),
        "metrics": RoundMetrics.from_json(stored_round.METRICS.load(row["metrics"])),
        "quarantined": json.loads(row["quarantined"]),
    }
    return Round(**{**row, **stored})
