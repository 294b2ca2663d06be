"""The chat: conversations, messages, votes. Each action ends by showing the conversation as the server stores it."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

from prefloop.v1.chat_pb2 import Conversation, Turn
from prefloop.v1.feedback_pb2 import (
    CHOICE_A,
    CHOICE_B,
    CHOICE_BOTH_BAD,
    CHOICE_TIE,
    CHOICE_UNSPECIFIED,
    THUMB_DOWN,
    THUMB_UNSPECIFIED,
    THUMB_UP,
)
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from clients.errors import PrefloopError
from clients.web.rendering import turn_id, unfinished
from clients.web.sign_in import SignedIn
from clients.web.site import Site, enter, first, form_of
from clients.web.turns_under_way import TurnUnderWay

SIDEBAR_CONVERSATIONS = 30
LISTED_CONVERSATIONS = 1000
# How often an answer that another program asked for is fetched until it has ended.
LOOK_SECONDS = 1.0
THUMBS = {"up": THUMB_UP, "down": THUMB_DOWN}
CHOICES = {"a": CHOICE_A, "b": CHOICE_B, "tie": CHOICE_TIE, "both-bad": CHOICE_BOTH_BAD}


async def show(request: Request) -> Response:
    """Shows a conversation, or an empty new one."""
    site, person = await enter(request)
    conversation_id = request.path_params.get("conversation_id", "")
    conversation = await person.client.conversation(conversation_id) if conversation_id else Conversation()
    turns = list(conversation.turns)
    notices = {turn_id(turn): site.turns.notice(turn) for turn in turns}
    live = site.turns.find(person, conversation_id)
    if live:
        turns = [*(turn for turn in turns if turn_id(turn) != turn_id(live.turn)), live.turn]
        notices[turn_id(live.turn)] = live.notice
    return await site.page(
        request,
        person,
        "chat.html.j2",
        conversation=conversation,
        turns=turns,
        notices=notices,
        # Only the program that asked for an answer can stop it.
        stoppable=live is not None,
        conversations=await first(SIDEBAR_CONVERSATIONS, person.client.conversations()),
        request_id=str(uuid.uuid4()),
    )


async def listing(request: Request) -> Response:
    site, person = await enter(request)
    conversations = await first(LISTED_CONVERSATIONS, person.client.conversations())
    return await site.page(request, person, "conversations.html.j2", conversations=conversations)


async def send(request: Request) -> Response:
    """Sends a message and shows its conversation while the answer is written."""
    site, person = await enter(request)
    form = await form_of(request)
    message, conversation_id = form["message"], form["conversation_id"]
    if site.turns.find(person, conversation_id):
        raise HTTPException(409, "The previous answer is still being written: wait for it, or stop it.")
    ask = person.client.compare if form["mode"] == "compare" else person.client.chat
    stream = ask(message, conversation_id=conversation_id, request_id=form["request_id"])
    live = await site.turns.begin(person, message, stream)
    return to_conversation(live.conversation_id)


async def follow(request: Request) -> Response:
    """Streams the turn that is being answered, as HTML, whenever it grows. 204 if no answer is being written."""
    site, person = await enter(request)
    conversation_id = request.path_params["conversation_id"]
    if live := site.turns.find(person, conversation_id):
        return EventSourceResponse(_grow(site, conversation_id, live))
    conversation = await person.client.conversation(conversation_id)
    if conversation.turns and unfinished(conversation.turns[-1]):
        return EventSourceResponse(_look(site, person, conversation))
    return Response(status_code=204)


async def stop(request: Request) -> Response:
    site, person = await enter(request)
    conversation_id = request.path_params["conversation_id"]
    if live := site.turns.find(person, conversation_id):
        live.stop()
    return to_conversation(conversation_id)


async def delete(request: Request) -> Response:
    site, person = await enter(request)
    conversation_id = request.path_params["conversation_id"]
    # The server would wait for an answer that is being written.
    if live := site.turns.find(person, conversation_id):
        live.stop()
    await person.client.delete_conversation(conversation_id)
    return RedirectResponse("/", 303)


async def set_thumb(request: Request) -> Response:
    """Sets a thumb, possibly with a comment."""
    _, person = await enter(request)
    form = await form_of(request)
    await person.client.thumb(
        form["response_id"], THUMBS.get(form["thumb"], THUMB_UNSPECIFIED), comment=form["comment"]
    )
    return to_conversation(form["conversation_id"])


async def choose(request: Request) -> Response:
    _, person = await enter(request)
    form = await form_of(request)
    await person.client.choose(
        form["comparison_id"], CHOICES.get(form["choice"], CHOICE_UNSPECIFIED), comment=form["comment"]
    )
    return to_conversation(form["conversation_id"])


async def correct(request: Request) -> Response:
    _, person = await enter(request)
    form = await form_of(request)
    await person.client.correct(form["response_id"], form["text"])
    return to_conversation(form["conversation_id"])


async def retract(request: Request) -> Response:
    _, person = await enter(request)
    form = await form_of(request)
    await person.client.retract(form["feedback_id"])
    return to_conversation(form["conversation_id"])


def to_conversation(conversation_id: str) -> Response:
    return RedirectResponse(f"/c/{conversation_id}", 303)


async def _grow(site: Site, conversation_id: str, live: TurnUnderWay) -> AsyncIterator[ServerSentEvent]:
    draw = partial(_html, site, conversation_id)
    async for _ in live.changes():
        yield ServerSentEvent(event="turn", data=live.drawn(draw))
    yield ServerSentEvent(event="end", data="")


async def _look(site: Site, person: SignedIn, conversation: Conversation) -> AsyncIterator[ServerSentEvent]:
    # On an error the page reloads itself and shows it.
    with suppress(PrefloopError):
        while unfinished(conversation.turns[-1]):
            await asyncio.sleep(LOOK_SECONDS)
            conversation = await person.client.conversation(conversation.conversation_id)
        html = _html(site, conversation.conversation_id, conversation.turns[-1], "")
        yield ServerSentEvent(event="turn", data=html)
    yield ServerSentEvent(event="end", data="")


def _html(site: Site, conversation_id: str, turn: Turn, notice: str) -> str:
    return site.fragment("turn.html.j2", conversation_id=conversation_id, turn=turn, notice=notice)


ROUTES = [
    Route("/", show),
    Route("/c/{conversation_id}", show),
    Route("/c/{conversation_id}/answer", follow),
    Route("/c/{conversation_id}/stop", stop, methods=["POST"]),
    Route("/c/{conversation_id}/delete", delete, methods=["POST"]),
    Route("/conversations", listing),
    Route("/messages", send, methods=["POST"]),
    Route("/thumbs", set_thumb, methods=["POST"]),
    Route("/choices", choose, methods=["POST"]),
    Route("/corrections", correct, methods=["POST"]),
    Route("/retractions", retract, methods=["POST"]),
]
