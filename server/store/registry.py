"""Policies, rounds, replicas and leases: the half of the store that the learner and the operators write.

The pointer is the truth about what should serve; `replicas` say what does. Every write that a round makes takes the
round's lease and is refused once a later holder exists (fencing), so a learner that was stopped past its lease and
comes back can change nothing.
"""

import json
from collections.abc import Iterable
from typing import Any, Literal

from server.shared import stored_round
from server.shared.errors import ConflictError, FailedPreconditionError, NotFoundError
from server.store.ids import new_id
from server.store.records import Lease, PointerAction, PolicyVersion, Replica, RewardModelVersion, Round
from server.store.sqlite.database import Database, Row

REFERENCE = "v0000"
# The lease of the one learner that may be at work.
LEARNER = "learner"
# A server without a heartbeat for so long is gone.
ALIVE_SECONDS = 30.0
# Of a replica or listener: its last heartbeat is at most so long ago. Of a lease: somebody has it. The clock is
# server.store.sqlite.clock's.
BEAT_WITHIN = "boot = boot_id() AND uptime() - uptime <= ?"
HELD = "(boot = boot_id() AND expire_uptime > uptime())"


class Registry:
    """Reads and writes of policies, reward models, rounds, the pointer, replicas and leases."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # Policies and the pointer

    def register_reference(self) -> None:
        """Records v0000 and points at it, once; later calls change nothing."""
        with self._db.write():
            if self._db.row("SELECT 1 FROM policies WHERE version = ?", [REFERENCE]):
                return
            now = self._db.now()
            self._db.insert(
                "policies",
                {
                    "version": REFERENCE,
                    "state": "active",
                    "kind": "full",
                    "reference_version": REFERENCE,
                    "create_time": now,
                    "activate_time": now,
                },
            )
            self._db.insert("pointer", {"id": 1, "version": REFERENCE})
            self._db.insert(
                "pointer_events",
                {"version": REFERENCE, "actor": "server", "reason": "first start", "create_time": now},
            )

    def register_policy(
        self,
        version: str,
        *,
        kind: Literal["adapter", "full"],
        state: Literal["candidate", "rejected"],
        parent_version: str,
        reference_version: str,
        round_id: str | None,
        reward_model_version: str | None,
        metrics: dict[str, Any],
        reason: str = "",
        fence: Lease | None = None,
    ) -> PolicyVersion:
        """Records a version whose directory is published. Registering it again changes nothing."""
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
                        "round_id": round_id,
                        "reward_model_version": reward_model_version,
                        "metrics": json.dumps(metrics),
                        "reason": reason,
                        "create_time": self._db.now(),
                    },
                )
            return self.policy(version)

    def policy(self, version: str) -> PolicyVersion:
        row = self._db.row("SELECT * FROM policies WHERE version = ?", [version])
        if row is None:
            raise NotFoundError("policy", version)
        return _policy(row)

    def policies(self, limit: int = 1000, before: str | None = None) -> list[PolicyVersion]:
        """Newest first; `before` is the version after which the page starts."""
        return [_policy(row) for row in self._page("policies", "version", limit, before)]

    def next_version(self) -> str:
        """The version after the highest that was registered."""
        newest = self.policies(limit=1)
        return f"v{int(newest[0].version[1:]) + 1:04d}" if newest else REFERENCE

    def active_policy(self) -> PolicyVersion:
        """What should serve. Raises NotFoundError before the first start of a server."""
        row = self._db.row("SELECT version FROM pointer")
        if row is None:
            raise NotFoundError("policy", REFERENCE)
        return self.policy(row["version"])

    def previous_version(self) -> str | None:
        """The version that was active before the active one, could be loaded and was not rolled back since, or None."""
        rows = self._db.rows(
            "SELECT e.version FROM pointer_events e JOIN policies p USING (version), pointer "
            "WHERE p.state = 'retired' AND p.prune_time IS NULL AND e.version != pointer.version AND NOT EXISTS "
            "(SELECT 1 FROM pointer_events WHERE previous_version = e.version AND action = 'rollback' AND seq > e.seq) "
            "ORDER BY e.seq DESC LIMIT 1"
        )
        return str(rows[0]["version"]) if rows else None

    def rollback_step(self, version: str | None = None, expected_active_version: str | None = None) -> tuple[str, str]:
        """What is active, and what a rollback makes active: `version`, or the previous one.

        Raises ConflictError where another version is active than expected, and FailedPreconditionError where there is
        none to go back to."""
        active, target = self.active_policy().version, version or self.previous_version()
        _check_active(active, expected_active_version)
        if target is None:
            raise FailedPreconditionError("NOTHING_TO_ROLL_BACK", f"No version was active before {active}.")
        return active, target

    def activate_policy(
        self,
        version: str,
        *,
        actor: str,
        action: PointerAction = "activate",
        reason: str = "",
        expected_active_version: str | None = None,
        fence: Lease | None = None,
    ) -> PolicyVersion:
        """Moves the pointer. Activating the active version changes nothing.

        Raises NotFoundError, ConflictError where another version is active than expected, and
        FailedPreconditionError for a version that an engine could not load, whose directory is gone, or, of a
        rollback, that was never active.
        """
        with self._db.write():
            check_fence(self._db, fence)
            policy, active = self.policy(version), self.active_policy()
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
            return self.policy(version)

    def fail_policy(self, version: str, reason: str, back_to: str) -> None:
        """Records that an engine could not load `version` and points at `back_to`, if `version` is still active.

        The reference is never marked failed: it is what everything falls back to.
        """
        with self._db.write():
            if self.active_policy().version != version:
                return
            if version == REFERENCE:
                return
            self._point(version, "failed", back_to, "fail", "server", reason)
            self._db.execute("UPDATE policies SET reason = ? WHERE version = ?", [reason, version])

    def prune_policy(self, version: str, *, fence: Lease | None = None) -> bool:
        """Marks that the version's directory goes, after which it cannot be activated; False where it is in use: the
        reference of any policy that is kept, what is active or loaded, or what a running round compares with."""
        with self._db.write():
            check_fence(self._db, fence)
            marked = self._db.execute(
                "UPDATE policies SET prune_time = unixepoch('subsec') WHERE version = ?1 AND prune_time IS NULL "
                "AND state != 'active' "
                "AND NOT EXISTS (SELECT 1 FROM policies WHERE reference_version = ?1) "
                "AND NOT EXISTS (SELECT 1 FROM replicas WHERE loaded_version = ?1 "
                "AND boot = boot_id() AND uptime() - uptime <= ?2) "
                "AND NOT EXISTS (SELECT 1 FROM rounds WHERE state = 'running' AND incumbent_version = ?1)",
                [version, ALIVE_SECONDS],
            )
            return marked > 0

    def _point(self, old: str, old_state: str, new: str, action: PointerAction, actor: str, reason: str) -> None:
        now = self._db.now()
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

    # Reward models

    def register_reward_model(
        self,
        version: str,
        *,
        reference_version: str,
        round_id: str | None,
        metrics: dict[str, Any],
        fence: Lease | None = None,
    ) -> None:
        """Records a published reward model. Registering it again changes nothing."""
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

    def reward_models(self) -> list[RewardModelVersion]:
        """Newest first."""
        return [_reward_model(row) for row in self._db.rows("SELECT * FROM reward_models ORDER BY rowid DESC")]

    def newest_reward_model(self) -> RewardModelVersion | None:
        row = self._db.row("SELECT * FROM reward_models ORDER BY rowid DESC LIMIT 1", [])
        return None if row is None else _reward_model(row)

    # Rounds

    def create_round(
        self,
        watermark: int,
        settings: dict[str, Any],
        *,
        reference_version: str,
        quarantined: Iterable[str] = (),
        fence: Lease,
    ) -> Round:
        """Begins a round from the active policy and the votes up to `watermark`, less those of `quarantined` users."""
        with self._db.write():
            check_fence(self._db, fence)
            round_id = new_id("round")
            self._db.insert(
                "rounds",
                {
                    "id": round_id,
                    "state": "running",
                    "stage": "snapshot",
                    "watermark": watermark,
                    "incumbent_version": self.active_policy().version,
                    "reference_version": reference_version,
                    "settings": stored_round.SETTINGS.dump(settings),
                    "attempts": 1,
                    "quarantined": json.dumps(sorted(quarantined)),
                    "create_time": self._db.now(),
                },
            )
            return self.round(round_id)

    def update_round(
        self,
        round_id: str,
        *,
        fence: Lease,
        stage: str | None = None,
        metrics: dict[str, Any] | None = None,
        policy_version: str | None = None,
        reward_model_version: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Round:
        """Records a finished stage; `metrics` are merged into what is there, `settings` replace it."""
        with self._db.write():
            check_fence(self._db, fence)
            old = self.round(round_id)
            self._db.execute(
                "UPDATE rounds SET stage = ?, metrics = ?, policy_version = ?, reward_model_version = ?, settings = ? "
                "WHERE id = ?",
                [
                    stage or old.stage,
                    stored_round.METRICS.dump({**old.metrics, **(metrics or {})}),
                    policy_version or old.policy_version,
                    reward_model_version or old.reward_model_version,
                    stored_round.SETTINGS.dump(settings or old.settings),
                    round_id,
                ],
            )
            return self.round(round_id)

    def resume_round(self, round_id: str, *, fence: Lease) -> Round:
        """Counts that a round is gone on with."""
        return self._count_attempts(round_id, 1, fence)

    def stop_round(self, round_id: str, *, fence: Lease) -> Round:
        """Says that a round stops because it was asked to: that attempt does not count."""
        return self._count_attempts(round_id, -1, fence)

    def _count_attempts(self, round_id: str, by: int, fence: Lease) -> Round:
        with self._db.write():
            check_fence(self._db, fence)
            self._db.execute("UPDATE rounds SET attempts = attempts + ? WHERE id = ?", [by, round_id])
            return self.round(round_id)

    def finish_round(
        self,
        round_id: str,
        state: Literal["promoted", "rejected", "failed"],
        *,
        reason: str = "",
        fence: Lease | None = None,
    ) -> Round:
        """Ends a round."""
        with self._db.write():
            check_fence(self._db, fence)
            self._db.execute(
                "UPDATE rounds SET state = ?, reason = ?, finish_time = ? WHERE id = ?",
                [state, reason, self._db.now(), round_id],
            )
            return self.round(round_id)

    def round(self, round_id: str) -> Round:
        row = self._db.row("SELECT * FROM rounds WHERE id = ?", [round_id])
        if row is None:
            raise NotFoundError("round", round_id)
        return _round(row)

    def running_round(self) -> Round | None:
        """The round to go on with, or None."""
        row = self._db.row("SELECT * FROM rounds WHERE state = 'running' ORDER BY create_time DESC LIMIT 1")
        return _round(row) if row else None

    def last_learned(self) -> Round | None:
        """The newest round that came to a verdict, or None."""
        row = self._db.row("SELECT * FROM rounds WHERE state IN ('promoted', 'rejected') ORDER BY rowid DESC LIMIT 1")
        return _round(row) if row else None

    def rounds(self, limit: int = 1000, before: str | None = None) -> list[Round]:
        """Newest first; `before` is the round after which the page starts."""
        return [_round(row) for row in self._page("rounds", "id", limit, before)]

    def count_rounds(self) -> dict[str, int]:
        """How many rounds there were of each state, those of none left out."""
        return {
            row["state"]: row["n"] for row in self._db.rows("SELECT state, count(*) AS n FROM rounds GROUP BY state")
        }

    # Replicas

    def report_replica(self, replica_id: str, loaded_version: str, error: str = "") -> None:
        """A server says what it has loaded and why it is not the active version, if it is not."""
        with self._db.write():
            self._db.execute(
                "INSERT INTO replicas (id, loaded_version, error, heartbeat_time, uptime, boot) "
                "VALUES (?, ?, ?, unixepoch('subsec'), uptime(), boot_id()) ON CONFLICT (id) DO UPDATE SET "
                "loaded_version = excluded.loaded_version, error = excluded.error, "
                "heartbeat_time = excluded.heartbeat_time, uptime = excluded.uptime, boot = excluded.boot",
                [replica_id, loaded_version, error],
            )

    def remove_replica(self, replica_id: str) -> None:
        """A server stops."""
        with self._db.write():
            self._db.execute("DELETE FROM replicas WHERE id = ?", [replica_id])

    def replicas(self, max_age: float = ALIVE_SECONDS) -> list[Replica]:
        """Servers whose heartbeat is at most `max_age` seconds old."""
        rows = self._db.rows(
            "SELECT id, loaded_version, error, heartbeat_time, uptime() - uptime AS age FROM replicas "
            f"WHERE {BEAT_WITHIN} ORDER BY id",
            [max_age],
        )
        return [Replica(**row) for row in rows]

    # Leases, on the clock that nobody sets

    def acquire_lease(self, name: str, holder: str, seconds: float) -> Lease | None:
        """The lease, or None while another holder has it. A new holder gets a higher token."""
        with self._db.write():
            old = self._db.row(f"SELECT *, {HELD} AS held FROM leases WHERE name = ?", [name])
            if old and old["held"] and old["holder"] != holder:
                return None
            token = old["token"] + 1 if old else 1
            self._db.execute(
                "INSERT OR REPLACE INTO leases (name, holder, token, expire_time, expire_uptime, boot) "
                "VALUES (?1, ?2, ?3, unixepoch('subsec') + ?4, uptime() + ?4, boot_id())",
                [name, holder, token, seconds],
            )
            return Lease(name, holder, token)

    def renew_lease(self, lease: Lease, seconds: float) -> None:
        """It lasts `seconds` from now. Raises ConflictError once a later holder exists."""
        with self._db.write():
            check_fence(self._db, lease)
            self._db.execute(
                "UPDATE leases SET expire_time = unixepoch('subsec') + ?1, expire_uptime = uptime() + ?1 "
                "WHERE name = ?2",
                [seconds, lease.name],
            )

    def release_lease(self, lease: Lease) -> None:
        """Gives the lease back, if it is still this holder's. The token stays, so that the next one is higher."""
        with self._db.write():
            self._db.execute(
                "UPDATE leases SET expire_time = 0, expire_uptime = 0 WHERE name = ? AND token = ?",
                [lease.name, lease.token],
            )

    def _page(self, table: str, key: str, limit: int, before: str | None) -> list[Row]:
        # By rowid: versions and ids have no order of their own (v10000 sorts before v9999).
        where = f"WHERE rowid < (SELECT rowid FROM {table} WHERE {key} = ?)" if before else ""
        parameters = [before, limit] if before else [limit]
        return self._db.rows(f"SELECT * FROM {table} {where} ORDER BY rowid DESC LIMIT ?", parameters)


def check_fence(database: Database, fence: Lease | None) -> None:
    """Raises ConflictError where a later holder of the lease exists. Call it in the transaction that it guards."""
    if fence is None:
        return
    row = database.row("SELECT token, holder FROM leases WHERE name = ?", [fence.name])
    if row is None or row["token"] != fence.token:
        holder = row["holder"] if row else "nobody"
        raise ConflictError(f"The lease {fence.name!r} went to {holder}; nothing was written.")


def _check_active(active: str, expected: str | None) -> None:
    if expected is not None and active != expected:
        raise ConflictError(f"{active} is active, not {expected}; nothing was changed.")


def _policy(row: Row) -> PolicyVersion:
    return PolicyVersion(**{**row, "metrics": json.loads(row["metrics"])})


def _reward_model(row: Row) -> RewardModelVersion:
    return RewardModelVersion(**{**row, "metrics": json.loads(row["metrics"])})


def _round(row: Row) -> Round:
    stored = {
        "settings": stored_round.SETTINGS.load(row["settings"]),
        "metrics": stored_round.METRICS.load(row["metrics"]),
        "quarantined": json.loads(row["quarantined"]),
    }
    return Round(**{**row, **stored})
