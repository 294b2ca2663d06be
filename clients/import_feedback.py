"""`chat import-feedback`: ratings that people gave in Open WebUI, as votes on the answers that they are about.

Open WebUI keeps its own ids, so an answer is found by the messages before it. Each rating has a request id, so that an
export may be imported again: a rating counts once, and replaces the earlier one if it was changed since.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.v1.feedback_pb2 import ROLE_ASSISTANT, ROLE_USER, THUMB_DOWN, THUMB_UP, Message

from clients.client import Client
from clients.errors import InvalidRequestError, NotFoundError

ROLES = {"user": ROLE_USER, "assistant": ROLE_ASSISTANT}


class ExportError(ValueError):
    """The file is not such an export. The message is one sentence."""


@dataclass(frozen=True)
class Rating:
    """A rating in an export. `messages` end with the rated answer; `system` is the chat's own system prompt, if any."""

    request_id: str
    user: str
    messages: list[Message]
    system: str | None
    good: bool
    comment: str


def read_export(path: Path) -> Iterator[Rating | None]:
    """The ratings of Open WebUI's export of all feedback (Admin Panel, Evaluations, Feedback); None for one that cannot
    be read, such as of a picture. Raises ExportError, and OSError if the file cannot be read."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON.") from error
    if not isinstance(entries, list):
        raise ExportError(f"{path} is not a list of feedback, as Open WebUI exports it.")
    for entry in entries:
        try:
            if _is_rating(entry):
                yield _rating(entry)
        except (KeyError, TypeError, AttributeError, ValueError):
            yield None


def import_ratings(client_of: Callable[[str], Client], ratings: Iterable[Rating | None]) -> str:
    """Submits the ratings as thumbs, each with the client of the person who gave it; returns a sentence about them."""
    counts = Counter[str]()
    for rating in ratings:
        if rating is None:
            counts["unreadable"] += 1
            continue
        speaker = client_of(rating.user)
        response_id = _find(speaker, rating)
        if response_id is None:
            counts["unknown"] += 1
            continue
        thumb = THUMB_UP if rating.good else THUMB_DOWN
        speaker.thumb(response_id, thumb, comment=rating.comment, request_id=rating.request_id)
        counts["votes"] += 1
    parts = ["1 rating is a vote now" if counts["votes"] == 1 else f"{counts['votes']} ratings are votes now"]
    if counts["unknown"]:
        parts.append(f"{counts['unknown']} more are about answers that this server did not give")
    if counts["unreadable"]:
        parts.append(f"{counts['unreadable']} cannot be read")
    return "; ".join(parts) + "."


def _is_rating(entry: dict[str, Any]) -> bool:
    """Whether an entry rates an answer."""
    rated = str((entry["data"] or {}).get("rating")) in ("1", "-1")
    return entry["type"] == "rating" and rated and bool((entry["snapshot"] or {}).get("chat"))


def _rating(entry: dict[str, Any]) -> Rating:
    data, said = entry["data"], entry["snapshot"]["chat"]["chat"]
    return Rating(
        request_id=f"open-webui {entry['id']} {entry['updated_at']}",
        user=entry["user_id"],
        messages=_path(said["history"]["messages"], entry["meta"]["message_id"]),
        system=(said.get("params") or {}).get("system") or None,
        good=int(data["rating"]) > 0,
        comment=data.get("comment") or data.get("reason") or "",
    )


def _path(messages: dict[str, Any], last: str) -> list[Message]:
    """The messages from the beginning of a chat, which is a tree, to one of them."""
    found: list[Message] = []
    name: str | None = last
    while name is not None and len(found) < len(messages):
        message = messages[name]
        found.append(Message(role=ROLES[message["role"]], content=message["content"]))
        name = message.get("parentId")
    return found[::-1]


def _find(client: Client, rating: Rating) -> str | None:
    """The rated answer: after the chat's system prompt or, as where it has none, after the server's."""
    for system in dict.fromkeys([rating.system, None]):
        try:
            return client.find_response(rating.messages, system=system)
        except (NotFoundError, InvalidRequestError):
            continue
    return None
