"""Policy versions, and the pointer to the one that should be served.

Every write of a round takes the round's lease and is refused once a later holder exists (fencing), so a learner that
was suspended beyond its lease can change nothing when it continues.
"""

import json
from collections.abc import Iterable
from typing import Any, Literal

from server.shared.errors import ConflictError, FailedPreconditionError, NotFoundError
from server.store.database import UNLIMITED, Database, Row, newest_rows
from server.store.learning.canaries import end_canary, waiting_canary
from server.store.learning.leases import check_fence
from server.store.learning.records import Lease, PointerAction, PolicyVersion
from server.store.learning.replicas import ALIVE_SECONDS

# The reference of a new data directory. Others are data: `learner rebase` makes another model's version one, and
# `learner sft` one of the same model.
FIRST_REFERENCE = "v0000"
# SQL: the reference of the active version.
ACTIVE_REFERENCE = "SELECT reference_version FROM pointer JOIN policies USING (version)"
# SQL: its origin.
ACTIVE_ORIGIN = "SELECT origin_version FROM pointer JOIN policies USING (version)"


class Policies:
    """Reads and writes of versions and of the pointer."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def register_reference(self) -> None:
        """Record v0000 and point at it, once; later calls change nothing."""
        with self._db.write():
            if self._db.row("SELECT 1 FROM policies WHERE version = ?", [FIRST_REFERENCE]):
                return
            now = self._db.now()
            self._db.insert(
                "policies",
                {
                    "version": FIRST_REFERENCE,
                    "state": "active",
                    "kind": "full",
                    "reference_version": FIRST_REFERENCE,
                    "origin_version": FIRST_REFERENCE,
                    "create_time": now,
                    "activate_time": now,
                },
            )
            self._db.insert("pointer", {"id": 1, "version": FIRST_REFERENCE})
            self._db.insert(
                "pointer_events",
                {"version": FIRST_REFERENCE, "actor": "server", "reason": "first start", "create_time": now},
            )

    def register(
        self,
        version: str,
        *,
        kind: Literal["adapter", "full"],
        state: Literal["candidate", "rejected"],
        parent_version: str | None,
        reference_version: str,
        round_id: str | None,
        reward_model_version: str | None,
        metrics: dict[str, Any],
        reason: str = "",
        fence: Lease | None = None,
    ) -> PolicyVersion:
        """Record a version whose directory is published. It may be its own reference: of the model of its parent, or
        without one of another model. Registering it again changes nothing."""
        with self._db.write():
            check_fence(self._db, fence)
            if not self._db.row("SELECT 1 FROM policies WHERE version = ?", [version]):
                self._db.insert(
                    "policies",
                    {
                        "version": version,
                        "state": state,
                        "kind": kind,
                        "parent_version": parent_version,
                        "reference_version": reference_version,
                        "origin_version": self._origin(
                            parent_version if reference_version == version else reference_version
                        )
                        or reference_version,
                        "round_id": round_id,
                        "reward_model_version": reward_model_version,
                        "metrics": json.dumps(metrics),
                        "reason": reason,
                        "create_time": self._db.now(),
                    },
                )
            return self.get(version)

    def get(self, version: str) -> PolicyVersion:
        row = self._db.row("SELECT * FROM policies WHERE version = ?", [version])
        if row is None:
            raise NotFoundError("policy", version)
        return self._policies([row])[0]

    def page(self, limit: int = UNLIMITED, before: str | None = None) -> list[PolicyVersion]:
        """Newest first; `before` is the version after which the page starts."""
        return self._policies(newest_rows(self._db, "policies", "version", limit, before))

    def active(self) -> PolicyVersion:
        """The version that should be served. Raises NotFoundError before the first start of a server."""
        row = self._db.row("SELECT version FROM pointer")
        if row is None:
            raise NotFoundError("policy", FIRST_REFERENCE)
        return self.get(row["version"])

    def activations(self) -> dict[str, int]:
        """How often another version was made the active one, by action; zero counts are left out."""
        rows = self._db.rows(
            "SELECT action, count(*) AS n FROM pointer_events WHERE previous_version IS NOT NULL GROUP BY action"
        )
        return {row["action"]: row["n"] for row in rows}

    def reference(self) -> str | None:
        """The reference of the active version; None before the first start of a server."""
        row = self._db.row(ACTIVE_REFERENCE)
        return str(row["reference_version"]) if row else None

    def origin(self) -> str | None:
        """The origin of the active version; None before the first start of a server."""
        row = self._db.row(ACTIVE_ORIGIN)
        return str(row["origin_version"]) if row else None

    def origins(self) -> dict[str, str]:
        """The origin of every version. Versions of one origin are a lineage: one model and one tokenizer."""
        rows = self._db.rows("SELECT version, origin_version FROM policies")
        return {row["version"]: row["origin_version"] for row in rows}

    def last_served(self, origin: str) -> str | None:
        """The version of this lineage that was active last and could be loaded, or None."""
        row = self._db.row(
            "SELECT e.version FROM pointer_events e JOIN policies p USING (version) WHERE p.origin_version = ? "
            "AND p.state IN ('active', 'retired') AND p.prune_time IS NULL ORDER BY e.seq DESC LIMIT 1",
            [origin],
        )
        return str(row["version"]) if row else None

    def previous_version(self) -> str | None:
        """The last version active before the active one that could be loaded and was not rolled back since, or None."""
        rows = self._db.rows(
            "SELECT e.version FROM pointer_events e JOIN policies p USING (version), pointer "
            "WHERE p.state = 'retired' AND p.prune_time IS NULL AND e.version != pointer.version AND NOT EXISTS "
            "(SELECT 1 FROM pointer_events WHERE previous_version = e.version AND action = 'rollback' AND seq > e.seq) "
            "ORDER BY e.seq DESC LIMIT 1"
        )
        return str(rows[0]["version"]) if rows else None

    def rollback_step(self, version: str | None = None, expected_active_version: str | None = None) -> tuple[str, str]:
        """The active version, and the one that a rollback activates: `version`, or the previous one.

        Raises ConflictError if the active version is not the expected one, and FailedPreconditionError if there is none
        to go back to."""
        active, target = self.active().version, version or self.previous_version()
        _check_active(active, expected_active_version)
        if target is None:
            raise FailedPreconditionError("NOTHING_TO_ROLL_BACK", f"No version was active before {active}.")
        return active, target

    def activate(
        self,
        version: str,
        *,
        actor: str,
        action: PointerAction = "activate",
        reason: str = "",
        expected_active_version: str | None = None,
        fence: Lease | None = None,
    ) -> PolicyVersion:
        """Move the pointer. Activating the active version changes nothing.

        Raises NotFoundError, ConflictError if the active version is not the expected one, and FailedPreconditionError
        for a version that an engine could not load, whose directory was removed, or, in a rollback, that was never
        active.
        """
        with self._db.write():
            check_fence(self._db, fence)
            policy, active = self.get(version), self.active()
            _check_active(active.version, expected_active_version)
            if policy.state == "failed" and action != "promote":
                raise FailedPreconditionError("POLICY_FAILED", f"{version} could not be loaded before: {policy.reason}")
            if policy.prune_time is not None:
                raise FailedPreconditionError("POLICY_PRUNED", f"{version} was pruned: its weights are gone.")
            if version == active.version:
                return active
            if action == "rollback" and policy.state != "retired":
                raise FailedPreconditionError(
                    "NEVER_ACTIVE", f"{version} is {policy.state} and was never active; promote it instead."
                )
            self._point(active.version, "retired", version, action, actor, reason)
            return self.get(version)

    def fail(self, version: str, reason: str, back_to: str) -> None:
        """Record that an engine could not load `version`, and point at `back_to`, if `version` is still active.

        What was made from a model is never marked as failed, since everything of its lineage falls back to it.
        """
        with self._db.write():
            active = self.active()
            if active.version != version or active.origin_version == version:
                return
            self._point(version, "failed", back_to, "fail", "server", reason)
            self._db.execute("UPDATE policies SET reason = ? WHERE version = ?", [reason, version])
            # Its round may have ended: a canary's had, and one that did not wait for this server.
            self._db.execute(
                "UPDATE rounds SET state = 'rejected', reason = ? WHERE state = 'promoted' AND policy_version = ?",
                [f"{version} was activated and then reverted: {reason}", version],
            )

    def prune(self, version: str, *, fence: Lease | None = None) -> bool:
        """Mark that the version's directory is to be removed, so that it cannot be activated. False if it is in use: as
        the origin of its lineage, as the reference of another version that is not pruned, as the active or a loaded
        version, as the incumbent of a running round, or as a canary or its opponent."""
        with self._db.write():
            check_fence(self._db, fence)
            marked = self._db.execute(
                f"UPDATE policies SET prune_time = {self._db.NOW} WHERE version = ?1 AND prune_time IS NULL "
                "AND state != 'active' "
                "AND origin_version != ?1 AND NOT EXISTS (SELECT 1 FROM policies "
                "WHERE reference_version = ?1 AND version != ?1 AND prune_time IS NULL) "
                "AND NOT EXISTS (SELECT 1 FROM replicas WHERE loaded_version = ?1 "
                "AND boot = boot_id() AND uptime() - uptime <= ?2) "
                "AND NOT EXISTS (SELECT 1 FROM rounds WHERE state = 'running' AND incumbent_version = ?1) "
                "AND NOT EXISTS (SELECT 1 FROM canaries WHERE end_time IS NULL AND ?1 IN (version, opponent_version))",
                [version, ALIVE_SECONDS],
            )
            return marked > 0

    def _origin(self, version: str | None) -> str | None:
        row = self._db.row("SELECT origin_version FROM policies WHERE version = ?", [version])
        return str(row["origin_version"]) if row else None

    def _point(self, old: str, old_state: str, new: str, action: PointerAction, actor: str, reason: str) -> None:
        now = self._db.now()
        # A canary is compared with the active version; once that moves, there is nothing left to decide.
        if canary := waiting_canary(self._db):
            moved = f"{actor} made {new} the active version: {reason}"
            end_canary(self._db, canary.version, "promoted" if new == canary.version else "rejected", moved)
        self._db.execute("UPDATE policies SET state = ? WHERE version = ?", [old_state, old])
        self._db.execute("UPDATE policies SET state = 'active', activate_time = ? WHERE version = ?", [now, new])
        self._db.execute("UPDATE pointer SET version = ?", [new])
        self._db.insert(
            "pointer_events",
            {
                "version": new,
                "previous_version": old,
                "action": action,
                "actor": actor,
                "reason": reason,
                "create_time": now,
            },
        )

    def _policies(self, rows: Iterable[Row]) -> list[PolicyVersion]:
        canary = waiting_canary(self._db)
        return [_policy(row, waits=canary is not None and canary.version == row["version"]) for row in rows]


def _check_active(active: str, expected: str | None) -> None:
    if expected is not None and active != expected:
        raise ConflictError(f"{active} is active, not {expected}; nothing was changed.")


def _policy(row: Row, *, waits: bool) -> PolicyVersion:
    state = "canary" if waits and row["state"] == "candidate" else row["state"]
    return PolicyVersion(**{**row, "state": state, "metrics": json.loads(row["metrics"])})
