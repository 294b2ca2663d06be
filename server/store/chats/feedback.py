"""Votes. A vote writes an event and the current state in one transaction.

- A user has one current thumb and one correction per response and one choice per comparison; a later one replaces it
  under the same feedback id, and the event log keeps both.
- Event numbers are assigned under the write lock, so the highest one seen is a watermark: no smaller one commits later.
- The first choice decides how a conversation continues; a later change changes the vote, never the history.
"""

import json
import random
from collections.abc import Sequence
from datetime import date, timedelta

from server.shared.errors import FailedPreconditionError, NotFoundError, ResourceExhaustedError
from server.store.chats.records import Choice, Feedback, Kind, Slot, Turn, VoteCount
from server.store.chats.responses import Responses
from server.store.database import Database, Row, pages
from server.store.ids import new_id

# Limit of votes, corrections and retractions together on one answer or pair: each is a stored event.
MOST_EVENTS = 1_000
DAY_SECONDS = 86_400
EPOCH = date(1970, 1, 1)


class FeedbackTable:
    """Reads and writes of votes. Those of other users are not found."""

    def __init__(self, database: Database, responses: Responses) -> None:
        self._db = database
        self._responses = responses

    def submit_thumb(self, user: str, response_id: str, *, up: bool, comment: str = "") -> Feedback:
        """Raises NotFoundError, and FailedPreconditionError if the response is being sampled or has no text."""
        return self._submit(user, "thumb", "UP" if up else "DOWN", comment, response_id=response_id)

    def submit_correction(self, user: str, response_id: str, text: str) -> Feedback:
        """Raises NotFoundError, and FailedPreconditionError if the response is being sampled or has no text."""
        return self._submit(user, "correction", text, "", response_id=response_id)

    def submit_demonstration(self, user: str, messages: list[dict[str, str]]) -> Feedback:
        """`messages` are {"role", "content"}, the assistant's last."""
        return self._submit(user, "demonstration", json.dumps(messages, ensure_ascii=False), "")

    def count_demonstrations(self, user: str) -> int:
        """The number of stored demonstrations, including retracted ones, which stay in the log."""
        [row] = self._db.rows(
            "SELECT count(*) AS demonstrations FROM feedback_events "
            "WHERE user = ? AND kind = 'demonstration' AND value IS NOT NULL",
            [user],
        )
        return int(row["demonstrations"])

    def submit_choice(self, user: str, comparison_id: str, choice: Choice, comment: str = "") -> Feedback:
        """Raises NotFoundError, and FailedPreconditionError unless both answers are finished."""
        comparison = self._responses.comparison(user, comparison_id)
        if any(response.status != "finished" for response in (comparison.a, comparison.b)):
            raise FailedPreconditionError(
                "COMPARISON_UNFINISHED", "Both answers must be finished before one can be chosen."
            )
        with self._db.write():
            if comparison.state == "open":
                self._continue_with(comparison_id, choice)
            # A skipped comparison already continued with A, but the vote counts.
            elif comparison.state == "skipped":
                self._db.execute("UPDATE comparisons SET state = 'chosen' WHERE id = ?", [comparison_id])
            return self._submit(user, "choice", choice, comment, comparison_id=comparison_id)

    def submit_pair_choice(self, user: str, earlier: str, later: str, choice: Choice, comment: str = "") -> Feedback:
        """A choice between two answers that the user saw one after another; `earlier` is A. Raises the errors of
        `Responses.pair` and `submit_choice`."""
        with self._db.write():
            return self.submit_choice(user, self._responses.pair(user, earlier, later), choice, comment)

    def of_pairs(self, user: str) -> set[str]:
        """The ids of the user's feedback on comparisons that no turn has."""
        rows = self._db.rows(
            "SELECT f.id FROM feedback f JOIN comparisons c ON c.id = f.comparison_id WHERE f.user = ? AND c.blind = 0",
            [user],
        )
        return {row["id"] for row in rows}

    def retract(self, user: str, feedback_id: str) -> None:
        """Delete the current state; the log keeps its events. Raises NotFoundError."""
        with self._db.write():
            row = self._db.row("SELECT * FROM feedback WHERE id = ? AND user = ?", [feedback_id, user])
            if row is None:
                raise NotFoundError("feedback", feedback_id)
            self._log_event("retract", row, self._db.now())
            self._db.execute("DELETE FROM feedback WHERE id = ?", [feedback_id])

    def page(self, user: str, limit: int, before: int | None = None) -> list[Feedback]:
        """The user's current feedback, newest first; `before` is the event_seq after which the page starts."""
        rows = self._db.rows(
            "SELECT * FROM feedback WHERE user = ? AND event_seq < ? ORDER BY event_seq DESC LIMIT ?",
            [user, before if before is not None else 2**62, limit],
        )
        return [Feedback(**row) for row in rows]

    def on_turns(self, user: str, turns: Sequence[Turn]) -> list[Feedback]:
        """The user's current feedback on the answers in these turns."""
        comparisons = [turn.comparison for turn in turns if turn.comparison]
        responses = [turn.response for turn in turns if turn.response]
        responses += [response for each in comparisons for response in (each.a, each.b)]
        return [
            Feedback(**row)
            for column, targets in (("response_id", responses), ("comparison_id", comparisons))
            for page in pages(target.id for target in targets)
            for row in self._db.rows(
                f"SELECT * FROM feedback WHERE user = ? AND {column} IN ({', '.join('?' for _ in page)})", [user, *page]
            )
        ]

    def count_by_day(self, days: int) -> list[VoteCount]:
        """Counts of current feedback by kind for each of the last `days` UTC days including today, oldest first; zero
        counts are left out."""
        # Uses only the index feedback_by_day, in its order.
        rows = self._db.rows(
            f"SELECT {self._db.DAY} AS day, kind, count(*) AS votes FROM feedback WHERE {self._db.DAY} > ? "
            f"GROUP BY {self._db.DAY}, kind ORDER BY 1, 2",
            [int(self._db.now() / DAY_SECONDS) - days],
        )
        return [VoteCount(f"{EPOCH + timedelta(row['day'])}", row["kind"], row["votes"]) for row in rows]

    def _continue_with(self, comparison_id: str, choice: Choice) -> None:
        # For a tie, draw the answer here and record it, so that the conversation and the learner see the same history.
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
        """The time, and the id of the feedback that a vote replaces. Votes must be fast: this is one query, since each
        statement releases the GIL, and it does not read the response's tokens."""
        if response_id:
            found = self._db.rows(
                f"SELECT {self._db.NOW} AS now, "
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
                f"SELECT {self._db.NOW} AS now, "
                "(SELECT id FROM feedback WHERE user = ?1 AND comparison_id = ?2) AS old, "
                "(SELECT count(*) FROM feedback_events WHERE comparison_id = ?2) AS events",
                [user, comparison_id],
            )
        if found[0]["events"] >= MOST_EVENTS:
            sentence = f"You have voted {MOST_EVENTS} times on this answer, including changes, which is the limit."
            raise ResourceExhaustedError("VOTE_CHANGES", sentence)
        return found[0]["now"], found[0]["old"]

    def _log_event(self, action: str, row: Row, now: float) -> int:
        # Content is only in `submit` events: a retraction must not keep what it removes.
        content = {name: row[name] for name in ("value", "comment")} if action == "submit" else {}
        target = {name: row[name] for name in ("user", "kind", "response_id", "comparison_id")}
        return self._db.insert(
            "feedback_events",
            {"action": action, "feedback_id": row["id"], **target, **content, "create_time": now},
        )
