"""/v1/chat/completions: an answer, or two to compare, at once or as server-sent events.

Nothing is sent before the answer has begun, so that a refusal has its own status. An answer whose caller has left is
cancelled on the server.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from prefloop.v1.chat_pb2 import Usage
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from clients.errors import NotFoundError, PrefloopError
from clients.gateway.bodies import MODEL, ChatCompletion, read_completion
from clients.gateway.callers import Callers
from clients.gateway.errors import GatewayError, from_call
from clients.gateway.events import Begun, Ended, Event, Piece, ask, events

T = TypeVar("T")

# nginx's status for a caller who has left; nobody reads it.
LEFT = 499
IDEMPOTENCY_KEY = "idempotency-key"


async def chat_completions(request: Request) -> Response:
    callers: Callers = request.app.state.callers
    body = await read_completion(request)
    client = await callers.client(request, body.end_user)
    answer = events(ask(client, body, request.headers.get(IDEMPOTENCY_KEY, "")))
    try:
        if not body.stream:
            found = await unless_left(request, _whole(answer))
            return Response(status_code=LEFT) if found is None else JSONResponse(found)
        begun = await unless_left(request, _first(answer))
    except NotFoundError as error:
        # A completion names nothing else that could be missing.
        raise GatewayError(404, str(error), param="model", code="model_not_found") from error
    if begun is None:
        return Response(status_code=LEFT)
    # The answer is closed however the response ends: Starlette leaves its chunks to the garbage collector.
    closing = BackgroundTask(answer.aclose)
    return StreamingResponse(_chunks(begun, answer, body), media_type="text/event-stream", background=closing)


@dataclass(frozen=True)
class Head:
    """What every part of a completion has. The versions that sampled it stand in its model and fingerprint, except
    while a comparison is blind."""

    id: str
    created: int
    versions: tuple[str, ...] = ()

    @classmethod
    def of(cls, begun: Begun) -> "Head":
        return cls(begun.id, int(time.time()), (begun.version,) if begun.version else ())

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": f"{MODEL}@{self.versions[-1]}" if self.versions else MODEL,
            "system_fingerprint": "+".join(self.versions) or None,
        }


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None if the caller leaves first, which cancels it. The request's body must have been
    read."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        if working.cancel():
            await asyncio.wait([working])


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(answer: AsyncGenerator[Event]) -> Begun:
    begun = await anext(answer)
    assert isinstance(begun, Begun)
    return begun


async def _whole(answer: AsyncGenerator[Event]) -> dict[str, Any]:
    """The completion as one object."""
    head, ended = Head("", 0), list[Ended]()
    async for event in answer:
        match event:
            case Begun():
                head = Head.of(event)
            case Ended():
                ended.append(event)
                head = Head(head.id, head.created, event.versions or head.versions)
    choices = [
        {
            "index": one.index,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "logprobs": None,
            "finish_reason": one.finish_reason,
        }
        for one in sorted(ended, key=lambda one: one.index)
    ]
    return {**head.fields("chat.completion"), "choices": choices, "usage": usage([one.usage for one in ended])}


async def _chunks(begun: Begun, answer: AsyncGenerator[Event], body: ChatCompletion) -> AsyncIterator[bytes]:
    """The completion as server-sent events. A failure is an event, too, and the last one."""
    head, ended = Head.of(begun), list[Ended]()
    with_usage = body.stream_options.include_usage
    same = _beginning(head)

    def chunk(index: int, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(same, [choice], {"usage": None} if with_usage else {})

    try:
        async with aclosing(answer):
            for index in range(body.n):
                yield chunk(index, {"role": "assistant", "content": ""})
            async for event in answer:
                match event:
                    case Piece():
                        yield chunk(event.index, {"content": event.text})
                    case Ended():
                        ended.append(event)
                        same = _beginning(Head(head.id, head.created, event.versions or head.versions))
                        yield chunk(event.index, {}, event.finish_reason)
    except PrefloopError as error:
        yield _data(from_call(error).body())
        return
    except GatewayError as error:
        yield _data(error.body())
        return
    if with_usage:
        yield _event(same, [], {"usage": usage([one.usage for one in ended])})
    yield b"data: [DONE]\n\n"


def usage(of_answers: list[Usage]) -> dict[str, int]:
    """The usage of all answers to one prompt."""
    prompt = max((one.prompt_tokens for one in of_answers), default=0)
    completion = sum(one.completion_tokens for one in of_answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _beginning(head: Head) -> str:
    """What is the same in all chunks, encoded once."""
    return _json(head.fields("chat.completion.chunk"))[:-1]


def _event(beginning: str, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
    rest = _json({"choices": choices, **more})[1:]
    return f"data: {beginning},{rest}\n\n".encode()


def _data(content: dict[str, Any]) -> bytes:
    return f"data: {_json(content)}\n\n".encode()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))
