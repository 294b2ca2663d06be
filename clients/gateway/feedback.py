"""/v1/feedback: votes on completions, by their ids. A repeated `Idempotency-Key` counts once."""

from typing import Any

from prefloop.v1.feedback_pb2 import (
    CHOICE_A,
    CHOICE_B,
    CHOICE_BOTH_BAD,
    CHOICE_TIE,
    FEEDBACK_KIND_CHOICE,
    FEEDBACK_KIND_THUMB,
    THUMB_DOWN,
    THUMB_UP,
    Feedback,
)
from starlette.requests import Request
from starlette.responses import JSONResponse

from clients.gateway.bodies import read_feedback, to_messages
from clients.gateway.callers import Callers
from clients.gateway.completions import IDEMPOTENCY_KEY

CHOICES = {"a": CHOICE_A, "b": CHOICE_B, "tie": CHOICE_TIE, "both_bad": CHOICE_BOTH_BAD}
WORDS = {choice: word for word, choice in CHOICES.items()}


async def submit(request: Request) -> JSONResponse:
    """A thumb (true or false), a choice, a correction, or a thumb and a correction. With `other_id` the choice is
    between two completions of the same messages, one after the other."""
    callers: Callers = request.app.state.callers
    body = await read_feedback(request)
    client = await callers.client(request, body.end_user)
    request_id = request.headers.get(IDEMPOTENCY_KEY, "")
    about = body.id or await client.find_response(to_messages(body.messages or []))
    stored = []
    if isinstance(body.value, str) and body.other_id is not None:
        choice = CHOICES[body.value]
        stored.append(
            await client.choose_pair(about, body.other_id, choice, comment=body.comment, request_id=request_id)
        )
    elif isinstance(body.value, str):
        stored.append(await client.choose(about, CHOICES[body.value], comment=body.comment, request_id=request_id))
    elif body.value is not None:
        thumb = THUMB_UP if body.value else THUMB_DOWN
        stored.append(await client.thumb(about, thumb, comment=body.comment, request_id=request_id))
    if body.correction is not None:
        stored.append(await client.correct(about, body.correction, request_id=request_id))
    return JSONResponse({"object": "list", "data": [_object(one) for one in stored]})


async def retract(request: Request) -> JSONResponse:
    callers: Callers = request.app.state.callers
    client = await callers.client(request, request.query_params.get("user"))
    feedback_id = request.path_params["feedback_id"]
    await client.retract(feedback_id)
    return JSONResponse({"id": feedback_id, "object": "feedback.deleted", "deleted": True})


def _object(feedback: Feedback) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": feedback.feedback_id,
        "object": "feedback",
        "created": feedback.create_time.seconds,
        "completion_id": feedback.response_id or feedback.comparison_id,
    }
    if feedback.kind == FEEDBACK_KIND_CHOICE:
        return {**found, "value": WORDS[feedback.choice], "comment": feedback.comment}
    if feedback.kind == FEEDBACK_KIND_THUMB:
        return {**found, "value": feedback.thumb == THUMB_UP, "comment": feedback.comment}
    return {**found, "correction": feedback.correction}
