"""Answers and comparisons, from beginning to end."""

import json
from collections.abc import Collection, Sequence
from typing import Literal

from server.shared.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from server.store.chats.loading import load_comparisons, load_responses
from server.store.chats.records import Comparison, Generation, Place, Response, Slot, Span, Status
from server.store.database import Database
from server.store.ids import new_id
from server.store.learning.replicas import Replicas
from server.store.packing import pack_floats, pack_ints

# After this, an answer that its server does not know was lost there: with the reply to a commit, for example.
FORGOTTEN_SECONDS = 60.0
# Status by finish reason; every other reason means finished.
STATUS_OF: dict[str, Status] = {"cancelled": "cancelled", "error": "failed"}


class Responses:
    """Reads and writes of answers and comparisons. Those of other users are not found."""

    def __init__(self, database: Database, replicas: Replicas) -> None:
        self._db = database
        self._replicas = replicas

    def begin(
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
        stop: Sequence[str] = (),
        place: Place | None = None,
    ) -> str:
        """Add a turn with one response that is being sampled; return the response's id. Without a place, the turn
        continues the conversation's newest one."""
        with self._db.write():
            response_id = self._insert_response(
                user, conversation_id, replica_id, policy_version, prompt_token_ids, temperature, max_tokens, seed, stop
            )
            insert_turn(self._db, conversation_id, message, place, response_id=response_id)
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
        stop: Sequence[str] = (),
        place: Place | None = None,
    ) -> tuple[str, str, str]:
        """Add a turn with two responses, from the versions and at the temperatures of A and B; return the ids of the
        comparison, A and B."""
        with self._db.write():
            a, b = (
                self._insert_response(
                    user,
                    conversation_id,
                    replica_id,
                    policy_version,
                    prompt_token_ids,
                    temperature,
                    max_tokens,
                    seed,
                    stop,
                )
                for policy_version, temperature, seed in zip(policy_versions, temperatures, seeds, strict=True)
            )
            comparison_id = self._insert_comparison(user, conversation_id, a, b, "open")
            insert_turn(self._db, conversation_id, message, place, comparison_id=comparison_id)
        return comparison_id, a, b

    def finish(self, response_id: str, generation: Generation, chosen_by: str | None = None) -> None:
        """Store what was sampled, however it ended, and the reward model that chose it. Raises UnavailableError if
        another server has marked it as failed."""
        status = STATUS_OF.get(generation.finish_reason, "finished")
        with self._db.write():
            changed = self._db.execute(
                "UPDATE responses SET status = ?, token_ids = ?, logprobs = ?, text = ?, finish_reason = ?, "
                f"chosen_by = ?, finish_time = {self._db.NOW} WHERE id = ? AND status != 'failed'",
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
            if not changed and self._db.row("SELECT 1 FROM responses WHERE id = ?", [response_id]):
                raise UnavailableError("This server was taken for gone, and its answer for failed; ask again.")
            # A conversation that was deleted while its answer was being sampled stays deleted.
            if changed:
                self._set_spans(response_id, generation.spans)

    def keep(self, response_id: str, so_far: Generation) -> None:
        """Store the beginning of an answer that is being written: what is left of it if its server is killed."""
        with self._db.write():
            if self._db.execute(
                "UPDATE responses SET token_ids = ?, logprobs = ?, text = ? WHERE id = ? AND status = 'streaming'",
                [pack_ints(so_far.token_ids), pack_floats(so_far.logprobs), so_far.text, response_id],
            ):
                self._set_spans(response_id, so_far.spans)

    def abandon(self, response_ids: Sequence[str], reason: Literal["cancelled", "error"]) -> None:
        """End those that have no stored result; the others stay unchanged."""
        with self._db.write():
            for response_id in response_ids:
                self._db.execute(
                    f"UPDATE responses SET status = ?, finish_reason = ?, finish_time = {self._db.NOW} "
                    "WHERE id = ? AND status = 'streaming'",
                    [STATUS_OF.get(reason, "finished"), reason, response_id],
                )

    def elsewhere(self, replica_id: str, target: str) -> bool:
        """Whether another server is writing an answer of this conversation or comparison, or this response."""
        row = self._db.row(
            "SELECT 1 FROM responses WHERE status = 'streaming' AND replica_id != ?1 AND (conversation_id = ?2 "
            "OR id = ?2 OR id IN (SELECT response_a FROM comparisons WHERE id = ?2 "
            "UNION ALL SELECT response_b FROM comparisons WHERE id = ?2)) LIMIT 1",
            [replica_id, target],
        )
        return row is not None

    def fail_interrupted(self, replica_id: str, *, starting: bool = False, writing: Collection[str] = ()) -> int:
        """Mark answers as failed that nobody writes: of servers that are no longer alive, and of this one those that it
        began a minute ago and is not `writing`, with `starting` all. Returns how many."""
        fail = f"UPDATE responses SET status = 'failed', finish_reason = 'error', finish_time = {self._db.NOW} WHERE "
        with self._db.write():
            alive = {replica.id for replica in self._replicas.alive()} - {replica_id}
            # No server's id is empty.
            alive.add("" if starting else replica_id)
            marks = ", ".join("?" for _ in alive)
            gone = self._db.execute(f"{fail} status = 'streaming' AND replica_id NOT IN ({marks})", sorted(alive))
            mine = self._db.rows(
                "SELECT id FROM responses WHERE status = 'streaming' AND replica_id = ? AND create_time < ?",
                [replica_id, self._db.now() - FORGOTTEN_SECONDS],
            )
            return gone + sum(
                self._db.execute(f"{fail} id = ?", [row["id"]]) for row in mine if row["id"] not in writing
            )

    def get(self, user: str, response_id: str) -> Response:
        response = load_responses(self._db, [response_id]).get(response_id)
        if response is None or response.user != user:
            raise NotFoundError("response", response_id)
        return response

    def comparison(self, user: str, comparison_id: str) -> Comparison:
        comparison = load_comparisons(self._db, [comparison_id]).get(comparison_id)
        if comparison is None or comparison.user != user:
            raise NotFoundError("comparison", comparison_id)
        return comparison

    def pair(self, user: str, earlier: str, later: str) -> str:
        """The id of the comparison of two answers that the user saw one after another; made if there is none. It is not
        blind, and no turn's: the conversation went on by itself. Raises NotFoundError, InvalidArgumentError if `later`
        came first, and FailedPreconditionError if they do not answer the same messages."""
        conversation_id = self.get(user, earlier).conversation_id
        self.get(user, later)
        turns = self._db.rows(
            "SELECT response_id, message, parent_seq, history FROM turns "
            "WHERE conversation_id = ? AND response_id IN (?, ?) ORDER BY seq",
            [conversation_id, earlier, later],
        )
        if (
            len(turns) != 2
            or turns[0]["message"] != turns[1]["message"]
            or turns[0]["parent_seq"] != turns[1]["parent_seq"]
        ):
            raise FailedPreconditionError("OTHER_MESSAGES", "The two answers are not to the same messages.")
        if turns[0]["response_id"] != earlier:
            raise InvalidArgumentError("response_id_a", "response_id_a must be the answer that came first.")
        with self._db.write():
            row = self._db.row(
                "SELECT id FROM comparisons WHERE response_a = ? AND response_b = ? AND blind = 0", [earlier, later]
            )
            if row:
                return str(row["id"])
            return self._insert_comparison(user, conversation_id, earlier, later, "skipped", blind=False)

    def skip_open_comparisons(self, conversation_id: str) -> None:
        """Mark open comparisons as skipped: the conversation continues with A, or with B if only B has an answer."""
        with self._db.write():
            rows = self._db.rows(
                "SELECT id FROM comparisons WHERE conversation_id = ? AND state = 'open'", [conversation_id]
            )
            for comparison in load_comparisons(self._db, (row["id"] for row in rows)).values():
                skip_comparison(self._db, comparison.id, comparison.unless_chosen)

    def _set_spans(self, response_id: str, spans: Sequence[Span]) -> None:
        self._db.execute("DELETE FROM spans WHERE response_id = ?", [response_id])
        for span in spans:
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

    def _insert_comparison(
        self, user: str, conversation_id: str, a: str, b: str, state: Literal["open", "skipped"], blind: bool = True
    ) -> str:
        comparison_id = new_id("cmp")
        self._db.insert(
            "comparisons",
            {
                "id": comparison_id,
                "conversation_id": conversation_id,
                "user": user,
                "response_a": a,
                "response_b": b,
                "state": state,
                "blind": int(blind),
                "create_time": self._db.now(),
            },
        )
        return comparison_id

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
        stop: Sequence[str],
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
                "stop": json.dumps(stop),
                "policy_version": policy_version,
                "create_time": self._db.now(),
            },
        )
        return response_id


def skip_comparison(database: Database, comparison_id: str, slot: Slot) -> None:
    """The conversation continues with this answer, without a choice."""
    database.execute("UPDATE comparisons SET state = 'skipped', continued_with = ? WHERE id = ?", [slot, comparison_id])


def insert_turn(database: Database, conversation_id: str, message: str, place: Place | None, **answer: str) -> int:
    """Insert a turn with its answer; return its number. Without a place, it continues the newest turn."""
    now = database.now()
    if place is None:
        [row] = database.rows("SELECT max(seq) AS seq FROM turns WHERE conversation_id = ?", [conversation_id])
        place = Place(row["seq"])
    seq = database.insert(
        "turns",
        {
            "conversation_id": conversation_id,
            "message": message,
            "create_time": now,
            "parent_seq": place.parent,
            "history": place.history,
            "asked": place.asked,
            **answer,
        },
    )
    database.execute("UPDATE conversations SET update_time = ? WHERE id = ?", [now, conversation_id])
    return seq
