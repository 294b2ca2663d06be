"""Answers and comparisons of any user, from their rows."""

import json
from collections import defaultdict
from collections.abc import Iterable

from server.store.chats.records import Comparison, Response, Span
from server.store.database import Database, Row, pages
from server.store.packing import unpack_floats, unpack_ints


def load_responses(database: Database, ids: Iterable[str | None]) -> dict[str, Response]:
    """Those of the responses that exist, of any user, by id."""
    found: dict[str, Response] = {}
    for page in pages(ids):
        marks = ", ".join("?" for _ in page)
        spans: dict[str, list[Span]] = defaultdict(list)
        for row in database.rows(f"SELECT * FROM spans WHERE response_id IN ({marks}) ORDER BY start", page):
            spans[row["response_id"]].append(
                Span(row["start"], row["end"], row["policy_version"], bool(row["stale_kv"]))
            )
        for row in database.rows(f"SELECT * FROM responses WHERE id IN ({marks})", page):
            found[row["id"]] = _response(row, spans[row["id"]])
    return found


def load_comparisons(database: Database, ids: Iterable[str | None]) -> dict[str, Comparison]:
    """Those of the comparisons that exist, of any user, by id."""
    rows = [
        row
        for page in pages(ids)
        for row in database.rows(f"SELECT * FROM comparisons WHERE id IN ({', '.join('?' for _ in page)})", page)
    ]
    responses = load_responses(database, (row[column] for row in rows for column in ("response_a", "response_b")))
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
        stop=tuple(json.loads(row["stop"])),
    )
