"""Review comparisons: pairs of answers that a round sampled, which people compare blind, apart from their own chats.

A pair is offered to everybody, or only to the user whose prompt it answers. Whoever takes it gets a conversation of the
kind `review` with an ordinary comparison, so that a choice on it is a vote like any other: it trains or judges, can be
retracted, exported and deleted.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from server.store.chats.conversations import Conversations
from server.store.chats.records import Generation, OfferedReview, Review, Span
from server.store.chats.responses import Responses
from server.store.database import Database, Row
from server.store.learning.leases import check_fence
from server.store.learning.records import Lease
from server.store.packing import pack_ints, unpack_ints

# In place of the replica that sampled an answer.
SAMPLED_BY = "learner"
# Two versions' answers, to decide about a canary; or two of one version, to learn from.
Purpose = Literal["canary", "learn"]


class Reviews:
    """Reads and writes of the queue of pairs to review."""

    def __init__(self, database: Database, conversations: Conversations, responses: Responses) -> None:
        self._db = database
        self._conversations = conversations
        self._responses = responses

    def offer(
        self, round_id: str, purpose: Purpose, reviews: Sequence[OfferedReview], *, fence: Lease | None = None
    ) -> None:
        """Offer these pairs of a round, instead of any that other rounds offer for this purpose. Those whose
        conversation was deleted in the meantime are left out. A round that did so before changes nothing."""
        with self._db.write():
            check_fence(self._db, fence)
            if self._db.row("SELECT 1 FROM reviews WHERE round_id = ? AND purpose = ?", [round_id, purpose]):
                return
            withdraw_reviews(self._db, purpose)
            given = [one.conversation_id for one in reviews if one.conversation_id]
            existing = self._conversations.existing(given)
            for one in reviews:
                if one.conversation_id is None or one.conversation_id in existing:
                    self._db.insert(
                        "reviews",
                        {
                            "round_id": round_id,
                            "purpose": purpose,
                            "conversation_id": one.conversation_id,
                            "user": one.user,
                            "messages": json.dumps(one.messages, ensure_ascii=False),
                            "prompt_token_ids": pack_ints(one.prompt_token_ids),
                            "answers": json.dumps([asdict(answer) for answer in one.answers], ensure_ascii=False),
                            "temperature": one.temperature,
                            "max_tokens": one.max_tokens,
                            "system": one.system,
                            "stop": json.dumps(one.stop),
                        },
                    )

    def next(self, user: str) -> Review | None:
        """The pair that the user was given and has not chosen from, else another one; None if there is none."""
        with self._db.write():
            if comparison_id := self._open(user):
                return self._review(user, comparison_id)
            row = self._db.row(
                f"SELECT * FROM reviews r WHERE {OFFERED} "
                # What a canary waits for first, then the user's own prompts, then pairs that few have seen.
                "ORDER BY purpose, user DESC, (SELECT count(*) FROM reviewed WHERE review_seq = r.seq), seq LIMIT 1",
                [user],
            )
            return self._review(user, self._take(user, row)) if row else None

    def skip(self, user: str, comparison_id: str) -> None:
        """Leave a pair without a choice; it is not offered to the user again. Raises NotFoundError."""
        with self._db.write():
            comparison = self._responses.comparison(user, comparison_id)
            self._responses.skip_open_comparisons(comparison.conversation_id)

    def waiting(self, user: str) -> int:
        """How many pairs the user may still compare."""
        [row] = self._db.rows(f"SELECT count(*) AS pairs FROM reviews r WHERE {OFFERED}", [user])
        return int(row["pairs"]) + (self._open(user) is not None)

    def _open(self, user: str) -> str | None:
        row = self._db.row(
            "SELECT c.id FROM reviewed JOIN comparisons c ON c.id = comparison_id JOIN reviews ON seq = review_seq "
            "WHERE reviewed.user = ? AND state = 'open' AND withdraw_time IS NULL ORDER BY review_seq LIMIT 1",
            [user],
        )
        return str(row["id"]) if row else None

    def _take(self, user: str, row: Row) -> str:
        """A comparison of the pair, in random order, in a new conversation; return its id."""
        messages = json.loads(row["messages"])
        a, b = random.sample(json.loads(row["answers"]), 2)
        conversation_id = self._conversations.create(user, messages[-1]["content"], kind="review", system=row["system"])
        comparison_id, *ids = self._responses.begin_comparison(
            user,
            conversation_id,
            message=messages[-1]["content"],
            replica_id=SAMPLED_BY,
            policy_versions=(a["policy_version"], b["policy_version"]),
            prompt_token_ids=unpack_ints(row["prompt_token_ids"]),
            temperatures=(row["temperature"], row["temperature"]),
            max_tokens=row["max_tokens"],
            seeds=(None, None),
            stop=json.loads(row["stop"]),
        )
        for response_id, answer in zip(ids, (a, b), strict=True):
            span = Span(0, len(answer["token_ids"]), answer.pop("policy_version"))
            self._responses.finish(response_id, Generation(**answer, spans=[span]))
        self._db.insert("reviewed", {"review_seq": row["seq"], "user": user, "comparison_id": comparison_id})
        return comparison_id

    def _review(self, user: str, comparison_id: str) -> Review:
        row = self._db.row(
            "SELECT messages FROM reviews JOIN reviewed ON review_seq = seq WHERE comparison_id = ?", [comparison_id]
        )
        assert row, "a review is deleted with its comparisons"
        return Review(json.loads(row["messages"]), self._responses.comparison(user, comparison_id))


def withdraw_reviews(database: Database, purpose: Purpose) -> None:
    """Offer the pairs for this purpose to nobody any more. Comparisons that exist stay."""
    with database.write():
        database.execute(
            f"UPDATE reviews SET withdraw_time = {database.NOW} WHERE purpose = ? AND withdraw_time IS NULL", [purpose]
        )


def review_key(messages: list[dict[str, str]]) -> str:
    """What all reviews of a prompt of nobody's have in common."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()


# SQL, on `reviews r`: may be given to the user bound to ?1.
OFFERED = (
    "withdraw_time IS NULL AND r.user IN ('', ?1) "
    "AND NOT EXISTS (SELECT 1 FROM reviewed WHERE review_seq = r.seq AND user = ?1)"
)
