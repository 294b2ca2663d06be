"""Published reward models."""

import json
from typing import Any

from server.store.database import Database, Row
from server.store.learning.leases import check_fence
from server.store.learning.records import Lease, RewardModelVersion


class RewardModels:
    """Reads and writes of reward models."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def register(
        self,
        version: str,
        *,
        reference_version: str,
        round_id: str | None,
        metrics: dict[str, Any],
        fence: Lease | None = None,
    ) -> None:
        """Record a published reward model. Registering it again changes nothing."""
        with self._db.write():
            check_fence(self._db, fence)
            if self._db.row("SELECT 1 FROM reward_models WHERE version = ?", [version]):
                return
            self._db.insert(
                "reward_models",
                {
                    "version": version,
                    "reference_version": reference_version,
                    "round_id": round_id,
                    "metrics": json.dumps(metrics),
                    "create_time": self._db.now(),
                },
            )

    def all(self) -> list[RewardModelVersion]:
        """Newest first."""
        return [_reward_model(row) for row in self._db.rows("SELECT * FROM reward_models ORDER BY rowid DESC")]

    def newest(self, reference: str) -> RewardModelVersion | None:
        """The newest that reads this reference's features, or None."""
        row = self._db.row(
            "SELECT * FROM reward_models WHERE reference_version = ? ORDER BY rowid DESC LIMIT 1", [reference]
        )
        return None if row is None else _reward_model(row)

    def reads(self, version: str, reference: str) -> bool:
        """Whether a reward model reads the token ids of this reference's model; not if it is not known."""
        sql = (
            "SELECT 1 FROM reward_models m JOIN policies its ON its.version = m.reference_version "
            "JOIN policies ours USING (origin_version) WHERE m.version = ? AND ours.version = ?"
        )
        return self._db.row(sql, [version, reference]) is not None


def _reward_model(row: Row) -> RewardModelVersion:
    return RewardModelVersion(**{**row, "metrics": json.loads(row["metrics"])})
