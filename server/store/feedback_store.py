"""What was said, sampled and voted, in one SQLite file. Imports neither torch nor vllm, so the learner may use it.

Semantics
- A write that returned is on disk (`server.store.sqlite.database`). A vote is an event and the current state, in one
  transaction.
- A user has one current thumb and one correction per response and one choice per comparison; a later one replaces it
  under the same feedback id, and the event log keeps both.
- Event numbers are given under the write lock, so the highest one seen is a watermark: no smaller one commits later.
- The first choice decides how a conversation goes on; a later change changes the vote, never the history.
- What is not this user's is not found.
"""

import json
import math
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from server.shared.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from server.store.deletion import Deletion
from server.store.ids import new_id
from server.store.keys import Keys
from server.store.lineage import Lineage
from server.store.quarantine import Quarantine
from server.store.records import (
    Choice,
    ChoiceVote,
    Comparison,
    Conversation,
    Correction,
    Demonstration,
    Feedback,
    Generation,
    Kind,
    Learner,
    Prompt,
    RepeatedRequest,
    Response,
    Slot,
    Snapshot,
    Span,
    Status,
    ThumbVote,
    Turn,
    VoteCount,
    pack_floats,
    pack_ints,
    unpack_floats,
    unpack_ints,
)
from server.store.registry import Registry
from server.store.round_requests import RoundRequests
from server.store.sqlite.database import DATABASE, Database, Row

TITLE_CHARACTERS = 60
# Of votes, corrections and retractions on one answer or pair together: each is an event that is kept.
MOST_EVENTS = 1_000
# SQLite binds at most 32,766 parameters; a page of ids stays far below.
IDS_PER_QUERY = 500

# Of `feedback_events e`: not replaced, retracted or deleted by a later event up to the one that is bound to the mark.
CURRENT = (
    "action = 'submit' AND value IS NOT NULL AND NOT EXISTS "
    "(SELECT 1 FROM feedback_events WHERE feedback_id = e.feedback_id AND seq > e.seq AND seq <= ?)"
)
# Of the same: given by one of the users in the bound JSON list.
AMONG = "user IN (SELECT value FROM json_each(?))"

# Of a response that ended for these reasons; every other one is finished.
STATUS_OF: dict[str, Status] = {"cancelled": "cancelled", "error": "failed"}


class FeedbackStore:
    """Conversations, responses and votes; `registry` holds policies and rounds, `lineage` what came of what, `keys` who
    comes in, `quarantine` whose votes are left out, `round_requests` who asks for rounds and who listens, `deletion`
    removes for good. One thread at a time."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self.registry = Registry(database)
        self.lineage = Lineage(database)
        self.keys = Keys(database)
        self.quarantine = Quarantine(database)
        self.round_requests = RoundRequests(database)
        self.deletion = Deletion(database, self.lineage)

    @classmethod
    def open(cls, data_dir: Path) -> "FeedbackStore":
        """The store in `data_dir`, created or migrated where needed. Raises DataDirectoryError."""
        return cls(Database(Path(data_dir) / DATABASE))

    @staticmethod
    def exists(data_dir: Path) -> bool:
        """Whether there is a store; `open` would make one."""
        return (data_dir / DATABASE).exists()

    def copy_to(self, data_dir: Path) -> None:
        """Puts a copy of the database, as of one moment, into another data directory. See `Database.copy_to`."""
        self._db.copy_to(data_dir / DATABASE)

    def close(self) -> None:
        self._db.close()

    # Repeated requests

    def find_request(self, user: str, rpc: str, request_id: str, body_sha256: bytes) -> bytes | None:
        """What the same request was answered first; None if it is new. Raises on another body under the same id, and
        where what the first one made was deleted."""
        row = self._db.row(
            "SELECT body_sha256, result FROM requests WHERE user = ? AND rpc = ? AND request_id = ?",
            [user, rpc, request_id],
        )
        if row is None:
            return None
        if not row["body_sha256"]:
            raise FailedPreconditionError("REQUEST_DELETED", "What this request made was deleted.")
        if row["body_sha256"] != body_sha256:
            raise InvalidArgumentError(
                "request_id", "This request_id was used with another body; make a new one.", "REQUEST_ID_REUSED"
            )
        return bytes(row["result"])

    def remember_request(
        self, user: str, rpc: str, request_id: str, body_sha256: bytes, result: bytes, target: str | None = None
    ) -> None:
        """Keeps the answer, which is about the response or comparison `target`, for `find_request`. Call it in the
        transaction that does what was asked."""
        self._db.execute(
            "INSERT INTO requests (user, rpc, request_id, body_sha256, result, target, create_time) "
            "VALUES (?, ?, ?, ?, ?, ?, unixepoch('subsec'))",
            [user, rpc, request_id, body_sha256, result, target],
        )

    def requests(self, user: str, limit: int, after: tuple[str, str] = ("", "")) -> list[RepeatedRequest]:
        """The request_ids of the user's that are kept, by RPC and id; `limit` at most that follow `after`."""
        rows = self._db.rows(
            "SELECT rpc, request_id, create_time FROM requests WHERE user = ? AND (rpc, request_id) > (?, ?) "
            "ORDER BY rpc, request_id LIMIT ?",
            [user, *after, limit],
        )
        return [RepeatedRequest(**row) for row in rows]

    def transaction(self) -> Any:
        """A context manager: what is written inside becomes durable together or not at all."""
        return self._db.write()

    def reading(self) -> Any:
        """A context manager: what is read inside is as of one moment."""
        return self._db.reading()

    def group(self) -> Any:
        """A context manager: the transactions inside stay apart, but share one commit. See `Database.group`."""
        return self._db.group()

    # Conversations

    def create_conversation(self, user: str, message: str) -> str:
        """The id of a new conversation, titled by its first message."""
        conversation_id, now = new_id("conv"), self._db.now()
        title = " ".join(message.split())
        if len(title) > TITLE_CHARACTERS:
            title = title[: TITLE_CHARACTERS - 1] + "…"
        with self._db.write():
            self._db.insert(
                "conversations",
                {"id": conversation_id, "user": user, "title": title, "create_time": now, "update_time": now},
            )
        return conversation_id

    def count_conversations(self, user: str) -> int:
        [row] = self._db.rows("SELECT count(*) AS conversations FROM conversations WHERE user = ?", [user])
        return int(row["conversations"])

    def conversation(self, user: str, conversation_id: str) -> Conversation:
        row = self._db.row("SELECT * FROM conversations WHERE id = ? AND user = ?", [conversation_id, user])
        if row is None:
            raise NotFoundError("conversation", conversation_id)
        return Conversation(**row)

    def conversations(self, user: str, limit: int, before: tuple[float, str] | None = None) -> list[Conversation]:
        """Newest first; `before` is the (update_time, id) after which the page starts."""
        before = before or (float("inf"), "")
        rows = self._db.rows(
            "SELECT * FROM conversations WHERE user = ? AND (update_time, id) < (?, ?) "
            "ORDER BY update_time DESC, id DESC LIMIT ?",
            [user, *before, limit],
        )
        return [Conversation(**row) for row in rows]

    def delete_conversation(self, user: str, conversation_id: str) -> None:
        """Removes the conversation for good. Raises NotFoundError."""
        with self._db.write():
            self.conversation(user, conversation_id)
            self.deletion.conversation(conversation_id)

    def conversations_there(self, ids: Iterable[str]) -> set[str]:
        """Those of the conversations, whosever they are, that were not deleted."""
        return {
            row["id"]
            for page in _pages(ids)
            for row in self._db.rows(f"SELECT id FROM conversations WHERE id IN ({', '.join('?' for _ in page)})", page)
        }

    def turns(self, user: str, conversation_id: str, limit: int = -1, after: int = 0) -> list[Turn]:
        """The conversation in order; `limit` turns at most that follow the one of the number `after`."""
        return self._turns(user, conversation_id, "seq > ? ORDER BY seq LIMIT ?", [after, limit])

    def newest_turns(self, user: str, conversation_id: str, limit: int, before: int | None = None) -> list[Turn]:
        """The last turns, the newest first; `limit` at most that come before the one of the number `before`."""
        most = 2**62 if before is None else before
        return self._turns(user, conversation_id, "seq < ? ORDER BY seq DESC LIMIT ?", [most, limit])

    def count_turns(self, conversation_id: str) -> int:
        [row] = self._db.rows("SELECT count(*) AS turns FROM turns WHERE conversation_id = ?", [conversation_id])
        return int(row["turns"])

    def _turns(self, user: str, conversation_id: str, which: str, parameters: list[int]) -> list[Turn]:
        self.conversation(user, conversation_id)
        rows = self._db.rows(
            f"SELECT * FROM turns WHERE conversation_id = ? AND {which}", [conversation_id, *parameters]
        )
        responses = self._responses(row["response_id"] for row in rows)
        comparisons = self._comparisons(row["comparison_id"] for row in rows)
        return [
            Turn(
                seq=row["seq"],
                message=row["message"],
                create_time=row["create_time"],
                dropped=bool(row["dropped"]),
                response=responses.get(row["response_id"]),
                comparison=comparisons.get(row["comparison_id"]),
            )
            for row in rows
        ]

    # Answers

    def begin_response(
        self,
        user: str,
        conversation_id: str,
        *,
        message: str,
        replica_id: str,
        policy_version: str,
        prompt_token_ids: list[int],
        temperature: float,
        max_tokens: int,
        seed: int | None,
    ) -> str:
        """Adds a turn with one response that is being sampled; returns the response's id."""
        with self._db.write():
            response_id = self._insert_response(
                user, conversation_id, replica_id, policy_version, prompt_token_ids, temperature, max_tokens, seed
            )
            self._insert_turn(conversation_id, message, response_id=response_id)
        return response_id

    def begin_comparison(
        self,
        user: str,
        conversation_id: str,
        *,
        message: str,
        replica_id: str,
        policy_versions: tuple[str, str],
        prompt_token_ids: list[int],
        temperatures: tuple[float, float],
        max_tokens: int,
        seeds: tuple[int | None, int | None],
    ) -> tuple[str, str, str]:
        """Adds a turn with two responses, from the versions and at the temperatures of A and B; returns the ids of the
        comparison, A and B."""
        comparison_id = new_id("cmp")
        with self._db.write():
            a, b = (
                self._insert_response(
                    user, conversation_id, replica_id, policy_version, prompt_token_ids, temperature, max_tokens, seed
                )
                for policy_version, temperature, seed in zip(policy_versions, temperatures, seeds, strict=True)
            )
            self._db.insert(
                "comparisons",
                {
                    "id": comparison_id,
                    "conversation_id": conversation_id,
                    "user": user,
                    "response_a": a,
                    "response_b": b,
                    "state": "open",
                    "create_time": self._db.now(),
                },
            )
            self._insert_turn(conversation_id, message, comparison_id=comparison_id)
        return comparison_id, a, b

    def finish_response(self, response_id: str, generation: Generation, chosen_by: str | None = None) -> None:
        """Stores what was sampled, whichever way it ended, and the reward model that chose it among others."""
        status = STATUS_OF.get(generation.finish_reason, "finished")
        with self._db.write():
            changed = self._db.execute(
                "UPDATE responses SET status = ?, token_ids = ?, logprobs = ?, text = ?, finish_reason = ?, "
                "chosen_by = ?, finish_time = unixepoch('subsec') WHERE id = ?",
                [
                    status,
                    pack_ints(generation.token_ids),
                    pack_floats(generation.logprobs),
                    generation.text,
                    generation.finish_reason,
                    chosen_by,
                    response_id,
                ],
            )
            # A conversation that was deleted while its answer was being sampled stays deleted.
            for span in generation.spans if changed else []:
                self._db.insert(
                    "spans",
                    {
                        "response_id": response_id,
                        "start": span.start,
                        "end": span.end,
                        "policy_version": span.policy_version,
                        "stale_kv": int(span.stale_kv),
                    },
                )

    def abandon_responses(self, response_ids: Sequence[str], reason: Literal["cancelled", "error"]) -> None:
        """Ends those that nothing was stored of; the others stay as they are."""
        with self._db.write():
            for response_id in response_ids:
                self._db.execute(
                    "UPDATE responses SET status = ?, finish_reason = ?, finish_time = unixepoch('subsec') "
                    "WHERE id = ? AND status = 'streaming'",
                    [STATUS_OF.get(reason, "finished"), reason, response_id],
                )

    def fail_interrupted_responses(self, replica_id: str, *, starting: bool = False) -> int:
        """Marks what servers were sampling that no longer live; `starting`: what this one was, before, too. Returns how
        many."""
        alive = {replica.id for replica in self.registry.replicas()} | {replica_id}
        alive -= {replica_id} if starting else set()
        with self._db.write():
            return self._db.execute(
                "UPDATE responses SET status = 'failed', finish_reason = 'error', finish_time = unixepoch('subsec') "
                f"WHERE status = 'streaming' AND replica_id NOT IN ({', '.join('?' for _ in alive)})",
                sorted(alive),
            )

    def response(self, user: str, response_id: str) -> Response:
        response = self._responses([response_id]).get(response_id)
        if response is None or response.user != user:
            raise NotFoundError("response", response_id)
        return response

    def comparison(self, user: str, comparison_id: str) -> Comparison:
        comparison = self._comparisons([comparison_id]).get(comparison_id)
        if comparison is None or comparison.user != user:
            raise NotFoundError("comparison", comparison_id)
        return comparison

    def skip_open_comparisons(self, conversation_id: str) -> None:
        """The user goes on without a choice: with A, or with B where A came to nothing."""
        with self._db.write():
            rows = self._db.rows(
                "SELECT id FROM comparisons WHERE conversation_id = ? AND state = 'open'", [conversation_id]
            )
            for comparison in self._comparisons(row["id"] for row in rows).values():
                self._db.execute(
                    "UPDATE comparisons SET state = 'skipped', continued_with = ? WHERE id = ?",
                    [comparison.unless_chosen, comparison.id],
                )

    # Feedback

    def submit_thumb(self, user: str, response_id: str, *, up: bool, comment: str = "") -> Feedback:
        """Raises NotFoundError, and FailedPreconditionError while the response is being sampled or came to nothing."""
        return self._submit(user, "thumb", "UP" if up else "DOWN", comment, response_id=response_id)

    def submit_correction(self, user: str, response_id: str, text: str) -> Feedback:
        """Raises NotFoundError, and FailedPreconditionError while the response is being sampled or came to nothing."""
        return self._submit(user, "correction", text, "", response_id=response_id)

    def submit_demonstration(self, user: str, messages: list[dict[str, str]]) -> Feedback:
        """`messages` are {"role", "content"}, the assistant's last."""
        return self._submit(user, "demonstration", json.dumps(messages, ensure_ascii=False), "")

    def count_demonstrations(self, user: str) -> int:
        """How many are kept; retracted ones are, in the log."""
        [row] = self._db.rows(
            "SELECT count(*) AS demonstrations FROM feedback_events "
            "WHERE user = ? AND kind = 'demonstration' AND value IS NOT NULL",
            [user],
        )
        return int(row["demonstrations"])

    def submit_choice(self, user: str, comparison_id: str, choice: Choice, comment: str = "") -> Feedback:
        """Raises NotFoundError, and FailedPreconditionError unless both answers were finished."""
        comparison = self.comparison(user, comparison_id)
        if any(response.status != "finished" for response in (comparison.a, comparison.b)):
            raise FailedPreconditionError(
                "COMPARISON_UNFINISHED", "Both answers must be finished before one can be chosen."
            )
        with self._db.write():
            if comparison.state == "open":
                self._continue_with(comparison_id, choice)
            # A skipped comparison already went on with A; the vote counts all the same.
            elif comparison.state == "skipped":
                self._db.execute("UPDATE comparisons SET state = 'chosen' WHERE id = ?", [comparison_id])
            return self._submit(user, "choice", choice, comment, comparison_id=comparison_id)

    def retract_feedback(self, user: str, feedback_id: str) -> None:
        """Removes the current state; the log keeps that there was one. Raises NotFoundError."""
        with self._db.write():
            row = self._db.row("SELECT * FROM feedback WHERE id = ? AND user = ?", [feedback_id, user])
            if row is None:
                raise NotFoundError("feedback", feedback_id)
            self._log_event("retract", row, self._db.now())
            self._db.execute("DELETE FROM feedback WHERE id = ?", [feedback_id])

    def feedback(self, user: str, limit: int, before: int | None = None) -> list[Feedback]:
        """The user's current feedback, newest first; `before` is the event_seq after which the page starts."""
        rows = self._db.rows(
            "SELECT * FROM feedback WHERE user = ? AND event_seq < ? ORDER BY event_seq DESC LIMIT ?",
            [user, before if before is not None else 2**62, limit],
        )
        return [Feedback(**row) for row in rows]

    def feedback_on(self, user: str, turns: Sequence[Turn]) -> list[Feedback]:
        """The user's current feedback on what is in these turns."""
        comparisons = [turn.comparison for turn in turns if turn.comparison]
        responses = [turn.response for turn in turns if turn.response]
        responses += [response for each in comparisons for response in (each.a, each.b)]
        return [
            Feedback(**row)
            for column, targets in (("response_id", responses), ("comparison_id", comparisons))
            for page in _pages(target.id for target in targets)
            for row in self._db.rows(
                f"SELECT * FROM feedback WHERE user = ? AND {column} IN ({', '.join('?' for _ in page)})", [user, *page]
            )
        ]

    def count_by_day(self, days: int) -> list[VoteCount]:
        """How much current feedback was given on each of the last `days` UTC days, today included, by kind; the oldest
        first, and nothing where there was none."""
        # By the index feedback_by_day alone, and in its order: the expression must be the index's to the letter.
        rows = self._db.rows(
            "SELECT date(day * 86400, 'unixepoch') AS date, kind, votes FROM (SELECT "
            "CAST(create_time / 86400 AS INTEGER) AS day, kind, count(*) AS votes FROM feedback "
            "WHERE CAST(create_time / 86400 AS INTEGER) > CAST(unixepoch('subsec') / 86400 AS INTEGER) - ? "
            "GROUP BY CAST(create_time / 86400 AS INTEGER), kind) ORDER BY day, kind",
            [days],
        )
        return [VoteCount(**row) for row in rows]

    def learner(self) -> Learner:
        """Who listens, what is at work, and what became of the last request."""
        requests = self.round_requests
        listening = requests.next_times()
        return Learner(
            listening=bool(listening),
            next_time=min((time for time in listening if time is not None), default=None),
            running=self.registry.running_round() if requests.at_work() else None,
            new_votes=self.count_new_votes(),
            request=requests.last(),
        )

    # What the learner reads

    def watermark(self) -> int:
        """The number of the newest feedback event; 0 before the first."""
        return int(self._db.rows("SELECT coalesce(max(seq), 0) AS seq FROM feedback_events")[0]["seq"])

    def count_votes(self, after: int = 0) -> int:
        """How many choices, thumbs and corrections are current, and were given or changed after the event `after`."""
        # By the index feedback_by_event alone: operators' pages ask again and again.
        [row] = self._db.rows(
            "SELECT count(*) AS votes FROM feedback WHERE event_seq > ? AND kind != 'demonstration'", [after]
        )
        return int(row["votes"])

    def votes_of(self, users: Collection[str], watermark: int) -> int:
        """How much feedback of these users was current at `watermark`, demonstrations too."""
        [row] = self._db.rows(
            f"SELECT count(*) AS votes FROM feedback_events e WHERE seq <= ? AND {AMONG} AND {CURRENT}",
            [watermark, json.dumps(list(users)), watermark],
        )
        return int(row["votes"])

    def count_new_votes(self) -> int:
        """How many of these no round has learned from yet."""
        learned = self.registry.last_learned()
        return self.count_votes(after=learned.watermark if learned else 0)

    def snapshot(
        self, watermark: int | None = None, limit: int | None = None, without: Collection[str] = ()
    ) -> Snapshot:
        """Feedback that was current at `watermark` (default: now), less what was deleted since and what users in
        `without` gave: the newest `limit` votes of the others, and every demonstration of theirs."""
        deletions = self.deletion.deletions()
        watermark = self.watermark() if watermark is None else watermark
        left_out = json.dumps(list(without))
        # Left out before the limit, or whoever votes most would keep the others out even so.
        events = self._db.rows(
            f"SELECT * FROM feedback_events e WHERE seq <= ? AND kind != 'demonstration' AND NOT {AMONG} AND {CURRENT} "
            "ORDER BY seq DESC LIMIT ?",
            [watermark, left_out, watermark, -1 if limit is None else limit],
        )
        demonstrations = self._db.rows(
            f"SELECT * FROM feedback_events e WHERE seq <= ? AND kind = 'demonstration' AND NOT {AMONG} AND {CURRENT} "
            "ORDER BY seq",
            [watermark, left_out, watermark],
        )
        by_kind: dict[str, list[Row]] = defaultdict(list)
        for event in reversed(events):
            by_kind[event["kind"]].append(event)
        comparisons = self._comparisons(event["comparison_id"] for event in by_kind["choice"])
        responses = self._responses(event["response_id"] for event in [*by_kind["thumb"], *by_kind["correction"]])
        return Snapshot(
            watermark=watermark,
            choices=[
                ChoiceVote(
                    event["feedback_id"],
                    event["user"],
                    event["value"],
                    comparison.id,
                    comparison.a,
                    comparison.b,
                    event["create_time"],
                )
                for event in by_kind["choice"]
                if (comparison := comparisons.get(event["comparison_id"]))
            ],
            thumbs=[
                ThumbVote(
                    event["feedback_id"],
                    event["user"],
                    1 if event["value"] == "UP" else -1,
                    response,
                    event["create_time"],
                )
                for event in by_kind["thumb"]
                if (response := responses.get(event["response_id"]))
            ],
            corrections=[
                Correction(event["feedback_id"], event["user"], event["value"], response, event["create_time"])
                for event in by_kind["correction"]
                if (response := responses.get(event["response_id"]))
            ],
            demonstrations=[
                Demonstration(event["feedback_id"], event["user"], json.loads(event["value"]), event["create_time"])
                for event in demonstrations
            ],
            deletions=deletions,
        )

    def prompts(
        self, before: float | None = None, limit: int | None = None, without: Collection[str] = ()
    ) -> list[Prompt]:
        """What users asked, each distinct prompt once, in the order it was first asked. Where a time and a `limit` are
        given, of so many responses before: everybody's newest, then everybody's second, and so on. None of users in
        `without`."""
        rows = self._db.rows(
            "WITH placed AS (SELECT rowid AS number, "
            "row_number() OVER (PARTITION BY user ORDER BY rowid DESC) AS place "
            f"FROM responses WHERE create_time < ? AND NOT {AMONG}), "
            "chosen AS (SELECT number FROM placed ORDER BY place, number DESC LIMIT ?), "
            "asked AS (SELECT conversation_id, user, prompt_token_ids, max_tokens, min(number) AS first "
            "FROM chosen JOIN responses r ON r.rowid = number GROUP BY prompt_token_ids) "
            "SELECT *, first = (SELECT min(rowid) FROM responses WHERE conversation_id = asked.conversation_id) "
            "AS opens, (SELECT message FROM turns WHERE conversation_id = asked.conversation_id ORDER BY seq LIMIT 1) "
            "AS opening FROM asked ORDER BY first",
            [math.inf if before is None else before, json.dumps(list(without)), -1 if limit is None else limit],
        )
        openers: dict[str, str] = {}
        return [
            Prompt(
                row["conversation_id"],
                unpack_ints(row["prompt_token_ids"]),
                row["max_tokens"],
                row["user"],
                openers.setdefault(row["opening"], row["conversation_id"]) if row["opens"] else "",
            )
            for row in rows
        ]

    # Helpers

    def _insert_turn(self, conversation_id: str, message: str, **answer: str) -> None:
        now = self._db.now()
        self._db.insert("turns", {"conversation_id": conversation_id, "message": message, "create_time": now, **answer})
        self._db.execute("UPDATE conversations SET update_time = ? WHERE id = ?", [now, conversation_id])

    def _insert_response(
        self,
        user: str,
        conversation_id: str,
        replica_id: str,
        policy_version: str,
        prompt_token_ids: list[int],
        temperature: float,
        max_tokens: int,
        seed: int | None,
    ) -> str:
        response_id = new_id("resp")
        self._db.insert(
            "responses",
            {
                "id": response_id,
                "conversation_id": conversation_id,
                "user": user,
                "replica_id": replica_id,
                "status": "streaming",
                "prompt_token_ids": pack_ints(prompt_token_ids),
                "temperature": temperature,
                "max_tokens": max_tokens,
                "seed": seed,
                "policy_version": policy_version,
                "create_time": self._db.now(),
            },
        )
        return response_id

    def _responses(self, ids: Iterable[str | None]) -> dict[str, Response]:
        found: dict[str, Response] = {}
        for page in _pages(ids):
            marks = ", ".join("?" for _ in page)
            spans: dict[str, list[Span]] = defaultdict(list)
            for row in self._db.rows(f"SELECT * FROM spans WHERE response_id IN ({marks}) ORDER BY start", page):
                spans[row["response_id"]].append(
                    Span(row["start"], row["end"], row["policy_version"], bool(row["stale_kv"]))
                )
            for row in self._db.rows(f"SELECT * FROM responses WHERE id IN ({marks})", page):
                found[row["id"]] = _response(row, spans[row["id"]])
        return found

    def _comparisons(self, ids: Iterable[str | None]) -> dict[str, Comparison]:
        rows = [
            row
            for page in _pages(ids)
            for row in self._db.rows(f"SELECT * FROM comparisons WHERE id IN ({', '.join('?' for _ in page)})", page)
        ]
        responses = self._responses(row[column] for row in rows for column in ("response_a", "response_b"))
        return {
            row["id"]: Comparison(
                id=row["id"],
                conversation_id=row["conversation_id"],
                user=row["user"],
                a=responses[row["response_a"]],
                b=responses[row["response_b"]],
                state=row["state"],
                continued_with=row["continued_with"],
                create_time=row["create_time"],
            )
            for row in rows
        }

    def _continue_with(self, comparison_id: str, choice: Choice) -> None:
        # A tie is drawn here and recorded, so that the conversation and the learner see one history.
        slot: Slot | None = None if choice == "BOTH_BAD" else random.choice(("A", "B")) if choice == "TIE" else choice
        self._db.execute(
            "UPDATE comparisons SET state = 'chosen', continued_with = ? WHERE id = ?", [slot, comparison_id]
        )
        if slot is None:
            self._db.execute("UPDATE turns SET dropped = 1 WHERE comparison_id = ?", [comparison_id])

    def _submit(
        self,
        user: str,
        kind: Kind,
        value: str,
        comment: str,
        *,
        response_id: str | None = None,
        comparison_id: str | None = None,
    ) -> Feedback:
        with self._db.write():
            now, old = self._now_and_old(user, kind, response_id, comparison_id)
            row: Row = {
                "id": old or new_id("fb"),
                "user": user,
                "kind": kind,
                "response_id": response_id,
                "comparison_id": comparison_id,
                "value": value,
                "comment": comment,
                "create_time": now,
            }
            row["event_seq"] = self._log_event("submit", row, now)
            if old:
                self._db.execute(
                    "UPDATE feedback SET event_seq = ?, value = ?, comment = ?, create_time = ? WHERE id = ?",
                    [row["event_seq"], value, comment, now, old],
                )
            else:
                self._db.insert("feedback", row)
        return Feedback(**row)

    def _now_and_old(
        self, user: str, kind: Kind, response_id: str | None, comparison_id: str | None
    ) -> tuple[float, str | None]:
        """The time, and the feedback that a vote replaces. One query, and not the whole response, tokens and all: each
        statement is a hand-over of Python's lock, and a vote is on the path that must be short."""
        if response_id:
            found = self._db.rows(
                "SELECT unixepoch('subsec') AS now, "
                "status = 'finished' OR (status != 'streaming' AND text != '') AS shown, "
                "(SELECT id FROM feedback WHERE user = r.user AND kind = ? AND response_id = r.id) AS old, "
                "(SELECT count(*) FROM feedback_events WHERE response_id = r.id) AS events "
                "FROM responses r WHERE id = ? AND user = ?",
                [kind, response_id, user],
            )
            if not found:
                raise NotFoundError("response", response_id)
            if not found[0]["shown"]:
                raise FailedPreconditionError("RESPONSE_NOT_SHOWN", "There is no answer yet to give feedback on.")
        else:
            found = self._db.rows(
                "SELECT unixepoch('subsec') AS now, "
                "(SELECT id FROM feedback WHERE user = ?1 AND comparison_id = ?2) AS old, "
                "(SELECT count(*) FROM feedback_events WHERE comparison_id = ?2) AS events",
                [user, comparison_id],
            )
        if found[0]["events"] >= MOST_EVENTS:
            sentence = f"You have voted {MOST_EVENTS} times on this answer, changes counted; no more is taken."
            raise ResourceExhaustedError("VOTE_CHANGES", sentence)
        return found[0]["now"], found[0]["old"]

    def _log_event(self, action: str, row: Row, now: float) -> int:
        # What was deleted leaves no trace of its content, not even in the event that says so.
        content = {name: row[name] for name in ("value", "comment")} if action == "submit" else {}
        target = {name: row[name] for name in ("user", "kind", "response_id", "comparison_id")}
        return self._db.insert(
            "feedback_events",
            {"action": action, "feedback_id": row["id"], **target, **content, "create_time": now},
        )


def _pages(ids: Iterable[str | None]) -> Iterable[Sequence[str]]:
    distinct = sorted({identifier for identifier in ids if identifier})
    for start in range(0, len(distinct), IDS_PER_QUERY):
        yield distinct[start : start + IDS_PER_QUERY]


def _response(row: Row, spans: list[Span]) -> Response:
    return Response(
        id=row["id"],
        conversation_id=row["conversation_id"],
        user=row["user"],
        status=row["status"],
        prompt_token_ids=unpack_ints(row["prompt_token_ids"]),
        token_ids=unpack_ints(row["token_ids"]),
        logprobs=unpack_floats(row["logprobs"]),
        text=row["text"],
        temperature=row["temperature"],
        max_tokens=row["max_tokens"],
        seed=row["seed"],
        finish_reason=row["finish_reason"],
        policy_version=row["policy_version"],
        create_time=row["create_time"],
        spans=spans,
        chosen_by=row["chosen_by"],
    )
