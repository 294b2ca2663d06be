"""The schema as a list of steps, for every database. A step that was released is never edited; the next one mends it.

Steps are written for SQLite; `server.store.postgres.dialect` reads them as PostgreSQL. Times are seconds since 1970 by
the database's clock.
"""

import re
from collections.abc import Callable
from typing import Any

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

migrations = Migrations("prefloop")

TARGET = re.compile(rb"(?:resp|cmp)_[0-9a-f]{24}")


def steps() -> dict[str, Callable[[Any], None]]:
    """All steps that this release has, by name, in their order."""
    return {step.name: step.fn for step in migrations.pending(Database(memory=True))}


def known_migrations() -> set[str]:
    """The names of all steps that this release has."""
    return set(steps())


def _run(db: Database, script: str) -> None:
    # Not executescript: it commits first, and a half-applied step must roll back.
    for statement in script.split(";\n"):
        if statement.strip():
            db.conn.execute(statement)


@migrations()
def m001_chat(db: Database) -> None:
    """Conversations, turns, responses with their version spans, comparisons, and repeated requests."""
    _run(
        db,
        """
        CREATE TABLE conversations (
            id TEXT PRIMARY KEY,
            user TEXT NOT NULL,
            title TEXT NOT NULL,
            create_time REAL NOT NULL,
            update_time REAL NOT NULL
        ) STRICT;
        CREATE INDEX conversations_by_user ON conversations (user, update_time);
        CREATE TABLE turns (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation_id TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            message TEXT NOT NULL,
            response_id TEXT,
            comparison_id TEXT,
            dropped INTEGER NOT NULL DEFAULT 0,
            create_time REAL NOT NULL
        ) STRICT;
        CREATE INDEX turns_by_conversation ON turns (conversation_id, seq);
        CREATE TABLE responses (
            id TEXT PRIMARY KEY,
            conversation_id TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            user TEXT NOT NULL,
            replica_id TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('streaming', 'finished', 'cancelled', 'failed')),
            prompt_token_ids BLOB NOT NULL,
            token_ids BLOB NOT NULL DEFAULT x'',
            logprobs BLOB NOT NULL DEFAULT x'',
            text TEXT NOT NULL DEFAULT '',
            temperature REAL NOT NULL,
            max_tokens INTEGER NOT NULL,
            seed INTEGER,
            finish_reason TEXT,
            policy_version TEXT NOT NULL,
            create_time REAL NOT NULL,
            finish_time REAL
        ) STRICT;
        CREATE INDEX responses_by_conversation ON responses (conversation_id);
        CREATE INDEX responses_streaming ON responses (replica_id) WHERE status = 'streaming';
        CREATE TABLE spans (
            response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
            start INTEGER NOT NULL,
            "end" INTEGER NOT NULL,
            policy_version TEXT NOT NULL,
            stale_kv INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (response_id, start)
        ) STRICT, WITHOUT ROWID;
        CREATE TABLE comparisons (
            id TEXT PRIMARY KEY,
            conversation_id TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            user TEXT NOT NULL,
            response_a TEXT NOT NULL REFERENCES responses (id),
            response_b TEXT NOT NULL REFERENCES responses (id),
            state TEXT NOT NULL CHECK (state IN ('open', 'chosen', 'skipped')),
            continued_with TEXT CHECK (continued_with IN ('A', 'B')),
            create_time REAL NOT NULL
        ) STRICT;
        CREATE INDEX comparisons_by_conversation ON comparisons (conversation_id);
        CREATE TABLE requests (
            user TEXT NOT NULL,
            rpc TEXT NOT NULL,
            request_id TEXT NOT NULL,
            body_sha256 BLOB NOT NULL,
            result BLOB NOT NULL,
            create_time REAL NOT NULL,
            PRIMARY KEY (user, rpc, request_id)
        ) STRICT, WITHOUT ROWID;
        """,
    )


@migrations()
def m002_feedback(db: Database) -> None:
    """Votes twice over: the event log that nothing is removed from, and each user's current state."""
    _run(
        db,
        """
        CREATE TABLE feedback (
            id TEXT PRIMARY KEY,
            event_seq INTEGER NOT NULL,
            user TEXT NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('thumb', 'choice', 'correction', 'demonstration')),
            response_id TEXT REFERENCES responses (id) ON DELETE CASCADE,
            comparison_id TEXT REFERENCES comparisons (id) ON DELETE CASCADE,
            value TEXT NOT NULL,
            comment TEXT NOT NULL,
            create_time REAL NOT NULL
        ) STRICT;
        CREATE UNIQUE INDEX feedback_one_per_response ON feedback (user, kind, response_id)
            WHERE response_id IS NOT NULL;
        CREATE UNIQUE INDEX feedback_one_per_comparison ON feedback (user, comparison_id)
            WHERE comparison_id IS NOT NULL;
        CREATE INDEX feedback_by_user ON feedback (user, event_seq);
        CREATE INDEX feedback_by_response ON feedback (response_id);
        CREATE INDEX feedback_by_comparison ON feedback (comparison_id);
        CREATE TABLE feedback_events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            action TEXT NOT NULL CHECK (action IN ('submit', 'retract', 'delete')),
            feedback_id TEXT NOT NULL,
            user TEXT NOT NULL,
            kind TEXT NOT NULL,
            response_id TEXT,
            comparison_id TEXT,
            value TEXT,
            comment TEXT,
            create_time REAL NOT NULL
        ) STRICT;
        CREATE INDEX feedback_events_by_feedback ON feedback_events (feedback_id, seq);
        """,
    )


@migrations()
def m003_policies(db: Database) -> None:
    """Policies, reward models, rounds, the pointer with its history, replicas and leases."""
    _run(
        db,
        """
        CREATE TABLE policies (
            version TEXT PRIMARY KEY,
            state TEXT NOT NULL CHECK (state IN ('candidate', 'active', 'retired', 'rejected', 'failed')),
            kind TEXT NOT NULL CHECK (kind IN ('adapter', 'full')),
            parent_version TEXT,
            reference_version TEXT NOT NULL,
            round_id TEXT,
            reward_model_version TEXT,
            metrics TEXT NOT NULL DEFAULT '{}',
            reason TEXT NOT NULL DEFAULT '',
            create_time REAL NOT NULL,
            activate_time REAL
        ) STRICT;
        CREATE TABLE pointer (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            version TEXT NOT NULL REFERENCES policies (version)
        ) STRICT;
        CREATE TABLE pointer_events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            version TEXT NOT NULL,
            previous_version TEXT,
            actor TEXT NOT NULL,
            reason TEXT NOT NULL,
            create_time REAL NOT NULL
        ) STRICT;
        CREATE TABLE reward_models (
            version TEXT PRIMARY KEY,
            reference_version TEXT NOT NULL,
            round_id TEXT,
            metrics TEXT NOT NULL DEFAULT '{}',
            create_time REAL NOT NULL
        ) STRICT;
        CREATE TABLE rounds (
            id TEXT PRIMARY KEY,
            state TEXT NOT NULL CHECK (state IN ('running', 'promoted', 'rejected', 'failed')),
            stage TEXT NOT NULL,
            watermark INTEGER NOT NULL,
            incumbent_version TEXT NOT NULL,
            reference_version TEXT NOT NULL,
            policy_version TEXT,
            reward_model_version TEXT,
            settings TEXT NOT NULL,
            metrics TEXT NOT NULL DEFAULT '{}',
            reason TEXT NOT NULL DEFAULT '',
            create_time REAL NOT NULL,
            finish_time REAL
        ) STRICT;
        CREATE TABLE replicas (
            id TEXT PRIMARY KEY,
            loaded_version TEXT NOT NULL,
            error TEXT NOT NULL DEFAULT '',
            heartbeat_time REAL NOT NULL
        ) STRICT;
        CREATE TABLE leases (
            name TEXT PRIMARY KEY,
            holder TEXT NOT NULL,
            token INTEGER NOT NULL,
            expire_time REAL NOT NULL
        ) STRICT;
        """,
    )


@migrations()
def m004_planned_answers(db: Database) -> None:
    """Which reward model chose a comparison's second answer among several; null where none did."""
    _run(db, "ALTER TABLE responses ADD COLUMN chosen_by TEXT")


@migrations()
def m005_lineage(db: Database) -> None:
    """Which votes a round learned from, how the pointer moved, what was pruned, and how often a round was begun."""
    _run(
        db,
        """
        CREATE TABLE round_votes (
            round_id TEXT NOT NULL REFERENCES rounds (id),
            feedback_id TEXT NOT NULL,
            side TEXT NOT NULL CHECK (side IN ('train', 'judge')),
            PRIMARY KEY (round_id, feedback_id)
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX round_votes_by_feedback ON round_votes (feedback_id);
        ALTER TABLE pointer_events ADD COLUMN action TEXT NOT NULL DEFAULT 'activate';
        ALTER TABLE policies ADD COLUMN prune_time REAL;
        ALTER TABLE rounds ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
        CREATE INDEX comparisons_by_time ON comparisons (create_time);
        """,
    )


@migrations()
def m006_keys(db: Database) -> None:
    """API keys: who comes in with what, and as what."""
    _run(
        db,
        """
        CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            sha256 BLOB NOT NULL,
            user TEXT NOT NULL,
            role TEXT NOT NULL CHECK (role IN ('user', 'operator')),
            create_time REAL NOT NULL,
            revoke_time REAL
        ) STRICT;
        CREATE INDEX keys_revoked ON keys (revoke_time) WHERE revoke_time IS NOT NULL;
        """,
    )


@migrations()
def m007_quarantine(db: Database) -> None:
    """Whose votes are left out of rounds, since when and why, and whose a round left out."""
    _run(
        db,
        """
        CREATE TABLE quarantine_events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            user TEXT NOT NULL,
            action TEXT NOT NULL CHECK (action IN ('set', 'lift')),
            actor TEXT NOT NULL,
            reason TEXT NOT NULL,
            create_time REAL NOT NULL
        ) STRICT;
        CREATE INDEX quarantine_events_by_user ON quarantine_events (user, seq);
        CREATE VIEW quarantined AS
            SELECT * FROM quarantine_events e WHERE action = 'set'
            AND seq = (SELECT max(seq) FROM quarantine_events WHERE user = e.user);
        ALTER TABLE rounds ADD COLUMN quarantined TEXT NOT NULL DEFAULT '[]';
        """,
    )


@migrations()
def m008_deletions(db: Database) -> None:
    """How much was deleted, and whether the file was rewritten since; what a repeated request's answer is about."""
    _run(
        db,
        """
        CREATE TABLE deletions (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            number INTEGER NOT NULL,
            rewritten INTEGER NOT NULL
        ) STRICT;
        INSERT INTO deletions VALUES (1, 1, 0);
        ALTER TABLE requests ADD COLUMN target TEXT;
        CREATE INDEX requests_by_target ON requests (target) WHERE target IS NOT NULL;
        CREATE INDEX conversations_by_time ON conversations (update_time);
        CREATE INDEX comparisons_by_response_a ON comparisons (response_a);
        CREATE INDEX comparisons_by_response_b ON comparisons (response_b);
        CREATE INDEX feedback_events_by_response ON feedback_events (response_id) WHERE response_id IS NOT NULL;
        CREATE INDEX feedback_events_by_comparison ON feedback_events (comparison_id) WHERE comparison_id IS NOT NULL;
        """,
    )
    # Requests from before are answered by an id, or by a message that holds one.
    for row in list(db.query("SELECT user, rpc, request_id, result FROM requests")):
        if found := TARGET.search(row["result"]):
            values = [found[0].decode(), row["user"], row["rpc"], row["request_id"]]
            db.conn.execute("UPDATE requests SET target = ? WHERE user = ? AND rpc = ? AND request_id = ?", values)


@migrations()
def m009_round_requests(db: Database) -> None:
    """Learners that listen, requests for a round; votes by the order and by the day they were given in."""
    _run(
        db,
        """
        CREATE TABLE listeners (
            id TEXT PRIMARY KEY,
            next_time REAL,
            heartbeat_time REAL NOT NULL
        ) STRICT;
        CREATE TABLE round_requests (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            listener TEXT,
            create_time REAL NOT NULL,
            end_time REAL,
            outcome TEXT NOT NULL DEFAULT ''
        ) STRICT;
        CREATE INDEX feedback_by_event ON feedback (event_seq, kind);
        CREATE INDEX feedback_by_day ON feedback (CAST(create_time / 86400 AS INTEGER), kind);
        """,
    )


@migrations()
def m010_uptime(db: Database) -> None:
    """Heartbeats and leases by a clock that nobody sets (server.clock); indexes that three steps got only after their
    release."""
    _run(
        db,
        """
        ALTER TABLE replicas ADD COLUMN uptime REAL NOT NULL DEFAULT 0;
        ALTER TABLE replicas ADD COLUMN boot TEXT NOT NULL DEFAULT '-';
        ALTER TABLE listeners ADD COLUMN uptime REAL NOT NULL DEFAULT 0;
        ALTER TABLE listeners ADD COLUMN boot TEXT NOT NULL DEFAULT '-';
        ALTER TABLE leases ADD COLUMN expire_uptime REAL NOT NULL DEFAULT 0;
        ALTER TABLE leases ADD COLUMN boot TEXT NOT NULL DEFAULT '-';
        CREATE INDEX IF NOT EXISTS comparisons_by_time ON comparisons (create_time);
        CREATE INDEX IF NOT EXISTS keys_revoked ON keys (revoke_time) WHERE revoke_time IS NOT NULL;
        CREATE INDEX IF NOT EXISTS feedback_by_event ON feedback (event_seq, kind);
        """,
    )


@migrations()
def m011_quotas(db: Database) -> None:
    """Events by user: the demonstrations that are kept of one, and what the export reads."""
    _run(
        db,
        """
        CREATE INDEX feedback_events_by_demonstrator ON feedback_events (user)
            WHERE kind = 'demonstration' AND value IS NOT NULL;
        CREATE INDEX feedback_events_by_user ON feedback_events (user, seq);
        """,
    )


@migrations()
def m012_reviews(db: Database) -> None:
    """Pairs of answers that a round offers for review, and the comparisons that users made of them. They are in
    conversations of their own."""
    _run(
        db,
        """
        ALTER TABLE conversations ADD COLUMN kind TEXT NOT NULL DEFAULT 'chat';
        CREATE TABLE reviews (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            round_id TEXT NOT NULL REFERENCES rounds (id),
            conversation_id TEXT REFERENCES conversations (id) ON DELETE CASCADE,
            user TEXT NOT NULL,
            messages TEXT NOT NULL,
            prompt_token_ids BLOB NOT NULL,
            answers TEXT NOT NULL,
            temperature REAL NOT NULL,
            max_tokens INTEGER NOT NULL,
            withdraw_time REAL
        ) STRICT;
        CREATE INDEX reviews_open ON reviews (user) WHERE withdraw_time IS NULL;
        CREATE INDEX reviews_by_conversation ON reviews (conversation_id) WHERE conversation_id IS NOT NULL;
        CREATE TABLE reviewed (
            review_seq INTEGER NOT NULL REFERENCES reviews (seq) ON DELETE CASCADE,
            user TEXT NOT NULL,
            comparison_id TEXT NOT NULL REFERENCES comparisons (id) ON DELETE CASCADE,
            PRIMARY KEY (review_seq, user)
        ) STRICT, WITHOUT ROWID;
        CREATE UNIQUE INDEX reviewed_by_comparison ON reviewed (comparison_id);
        CREATE INDEX reviewed_by_user ON reviewed (user);
        """,
    )


@migrations()
def m013_canaries(db: Database) -> None:
    """Versions that wait until votes on reviews decide whether they are served. At most one waits."""
    _run(
        db,
        """
        CREATE TABLE canaries (
            version TEXT PRIMARY KEY REFERENCES policies (version),
            opponent_version TEXT NOT NULL REFERENCES policies (version),
            round_id TEXT NOT NULL REFERENCES rounds (id),
            evidence REAL NOT NULL,
            max_votes INTEGER NOT NULL,
            unit INTEGER NOT NULL,
            user_votes INTEGER NOT NULL,
            create_time REAL NOT NULL,
            expire_time REAL NOT NULL,
            end_time REAL,
            outcome TEXT NOT NULL DEFAULT ''
        ) STRICT;
        CREATE UNIQUE INDEX canaries_waiting ON canaries ((end_time IS NULL)) WHERE end_time IS NULL;
        """,
    )


@migrations()
def m014_review_purposes(db: Database) -> None:
    """What a pair is offered for: to decide about a canary, or to learn from."""
    _run(db, "ALTER TABLE reviews ADD COLUMN purpose TEXT NOT NULL DEFAULT 'canary'")


@migrations()
def m015_stage_of_any_improver(db: Database) -> None:
    """The stage that trains the policy is not PPO's alone."""
    _run(db, "UPDATE rounds SET stage = 'improve' WHERE stage = 'ppo'")


@migrations()
def m016_machine_choices(db: Database) -> None:
    """What a machine judge said of comparisons, and how far each round has read it. Of a deleted comparison the row
    stays, without what was said, and of a deleted user without the name: what was trained on them stays known."""
    _run(
        db,
        """
        CREATE TABLE machine_choices (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            comparison_id TEXT NOT NULL,
            user TEXT NOT NULL,
            judge TEXT NOT NULL,
            shown TEXT,
            swapped TEXT,
            create_time REAL NOT NULL
        ) STRICT;
        CREATE UNIQUE INDEX machine_choices_once ON machine_choices (comparison_id, judge);
        CREATE INDEX machine_choices_by_user ON machine_choices (user);
        ALTER TABLE rounds ADD COLUMN judge TEXT NOT NULL DEFAULT '';
        ALTER TABLE rounds ADD COLUMN machine_watermark INTEGER NOT NULL DEFAULT 0;
        """,
    )


@migrations()
def m017_origins(db: Database) -> None:
    """Which version each was made from a model as: one model may have several references."""
    _run(
        db,
        """
        ALTER TABLE policies ADD COLUMN origin_version TEXT NOT NULL DEFAULT '';
        UPDATE policies SET origin_version = reference_version;
        """,
    )


@migrations()
def m018_kinds_of_round(db: Database) -> None:
    """A round learns from votes, or from demonstrations."""
    _run(db, "ALTER TABLE rounds ADD COLUMN kind TEXT NOT NULL DEFAULT 'alignment'")


@migrations()
def m019_imports(db: Database) -> None:
    """Preferences of other people, from files."""
    _run(
        db,
        """
        CREATE TABLE imports (
            id INTEGER PRIMARY KEY,
            name TEXT NOT NULL UNIQUE,
            source TEXT NOT NULL,
            create_time REAL NOT NULL
        ) STRICT;
        CREATE TABLE imported_preferences (
            id INTEGER PRIMARY KEY,
            import_id INTEGER NOT NULL REFERENCES imports (id),
            prompt TEXT NOT NULL,
            chosen TEXT NOT NULL,
            rejected TEXT NOT NULL
        ) STRICT;
        CREATE INDEX imported_by_import ON imported_preferences (import_id);
        """,
    )


@migrations()
def m020_system_prompts(db: Database) -> None:
    """A conversation may begin with a system prompt, and so may the prompt of a review."""
    for table in ("conversations", "reviews"):
        _run(db, f"ALTER TABLE {table} ADD COLUMN system TEXT NOT NULL DEFAULT ''")


@migrations()
def m021_histories(db: Database) -> None:
    """Callers may bring their own history, and stop sequences."""
    _run(
        db,
        """
        ALTER TABLE turns ADD COLUMN parent_seq INTEGER;
        ALTER TABLE turns ADD COLUMN given_answer TEXT;
        ALTER TABLE turns ADD COLUMN history BLOB;
        ALTER TABLE turns ADD COLUMN asked BLOB;
        UPDATE turns SET parent_seq =
            (SELECT max(seq) FROM turns b WHERE b.conversation_id = turns.conversation_id AND b.seq < turns.seq);
        CREATE INDEX turns_by_history ON turns (history) WHERE history IS NOT NULL;
        CREATE INDEX turns_by_asked ON turns (asked) WHERE asked IS NOT NULL;
        ALTER TABLE responses ADD COLUMN stop TEXT NOT NULL DEFAULT '[]';
        """,
    )


@migrations()
def m022_applications(db: Database) -> None:
    """A third role of keys, which names the people that it speaks for."""
    _run(
        db,
        """
        CREATE TABLE new_keys (
            id TEXT PRIMARY KEY,
            sha256 BLOB NOT NULL,
            user TEXT NOT NULL,
            role TEXT NOT NULL CHECK (role IN ('user', 'application', 'operator')),
            create_time REAL NOT NULL,
            revoke_time REAL
        ) STRICT;
        INSERT INTO new_keys (rowid, id, sha256, user, role, create_time, revoke_time)
            SELECT rowid, id, sha256, user, role, create_time, revoke_time FROM keys;
        DROP TABLE keys;
        ALTER TABLE new_keys RENAME TO keys;
        CREATE INDEX keys_revoked ON keys (revoke_time) WHERE revoke_time IS NOT NULL;
        """,
    )


@migrations()
def m023_pairs(db: Database) -> None:
    """Comparisons of two answers that a user saw one after another, with their versions."""
    _run(
        db,
        """
        ALTER TABLE comparisons ADD COLUMN blind INTEGER NOT NULL DEFAULT 1;
        CREATE UNIQUE INDEX comparisons_of_pairs ON comparisons (response_a, response_b) WHERE blind = 0;
        """,
    )


@migrations()
def m024_last_looks(db: Database) -> None:
    """What a canary's choices say at the end counts, too; of one that waits already it does not."""
    _run(db, "ALTER TABLE canaries ADD COLUMN last_level REAL NOT NULL DEFAULT 0")


@migrations()
def m025_stops_of_reviews(db: Database) -> None:
    """The stop sequences of the prompt that a pair answers."""
    _run(db, "ALTER TABLE reviews ADD COLUMN stop TEXT NOT NULL DEFAULT '[]'")


@migrations()
def m026_shared_versions(db: Database) -> None:
    """Where versions are in shared storage, the sums of their manifests, and this store's own name there."""
    _run(
        db,
        """
        CREATE TABLE shared_versions (
            folder TEXT NOT NULL CHECK (folder IN ('policies', 'reward_models')),
            version TEXT NOT NULL,
            object TEXT NOT NULL,
            manifest_sha256 TEXT NOT NULL,
            PRIMARY KEY (folder, version)
        ) STRICT, WITHOUT ROWID;
        CREATE TABLE identity (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            name TEXT NOT NULL
        ) STRICT;
        """,
    )


@migrations()
def m027_forgotten(db: Database) -> None:
    """Who was deleted lately, so that every server ends that user's calls. Not the name."""
    _run(
        db,
        """
        CREATE TABLE forgotten (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            user_sha256 BLOB NOT NULL,
            create_time REAL NOT NULL
        ) STRICT;
        """,
    )
