"""One call to the server, for threads and for asyncio: all that gRPC's two Python interfaces do differently.

A call that finds no server is sent again for as long as its `Backoff` says (`clients.retries`); a stream only until its
first event, since a second answer must not follow half of a first one.

A stream that was cancelled here simply ends. gRPC tells an asyncio program of that with the same CancelledError that
cancels a task, so the two are told apart by the task: where it is being cancelled the error goes on, and takes the
stream with it on the server.
"""

# gRPC's classes are generic in their stubs only, so annotations must not be evaluated.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc
from prefloop.v1.chat_pb2 import (
    ChatDelta,
    ChatFinished,
    ChatResponse,
    ChatStarted,
    CompareDelta,
    CompareFinished,
    CompareResponse,
    CompareStarted,
)

from clients.errors import closed_here, from_rpc_error
from clients.retries import AsyncPauses, Backoff, Pauses

ChatEvent = ChatStarted | ChatDelta | ChatFinished
CompareEvent = CompareStarted | CompareDelta | CompareFinished
Metadata = tuple[tuple[str, str], ...]

Event = TypeVar("Event")
Request = TypeVar("Request")
Reply = TypeVar("Reply")
ReplyT = TypeVar("ReplyT", covariant=True)


class StreamingCall(Protocol[ReplyT]):
    """The part of a gRPC stream that `Stream` needs."""

    def __iter__(self) -> Iterator[ReplyT]: ...

    def cancel(self) -> bool: ...


class AsyncStreamingCall(Protocol[ReplyT]):
    """The part of a grpc.aio stream that `AsyncStream` needs."""

    def __aiter__(self) -> AsyncIterator[ReplyT]: ...

    def cancel(self) -> bool: ...


class Heard:
    """What a stream has told so far. The ids are empty before the answer's Started event, and each is empty for good
    in a stream of another kind."""

    conversation_id = ""
    response_id = ""
    comparison_id = ""
    _anything = False
    _cancelled = False
    _address: str
    _backoff: Backoff

    def _hear(self, event: object) -> None:
        match event:
            case ChatStarted():
                self.conversation_id, self.response_id = event.conversation_id, event.response_id
            case CompareStarted():
                self.conversation_id, self.comparison_id = event.conversation_id, event.comparison_id

    def _pause_after(self, error: grpc.RpcError) -> float:
        """Seconds until the call is made again. Raises the PrefloopError where it is not."""
        failed = from_rpc_error(error, self._address, heard=self._anything)
        pause = None if self._anything else self._backoff.pause_after(failed)
        if pause is None:
            raise failed from error
        return pause


class Stream(Heard, Iterator[Event], Generic[Event]):
    """The events of one answer, as they come. `cancel` (from any thread) or leaving a `with` block stops the answer on
    the server too; the iterator then simply ends. A call that fails raises a `PrefloopError` from `next`.
    """

    def __init__(
        self,
        begin: Callable[[], StreamingCall[Reply]],
        unwrap: Callable[[Reply], Event | None],
        *,
        address: str,
        backoff: Backoff,
        pauses: Pauses,
    ) -> None:
        self._begin = begin
        self._unwrap: Callable[[Any], Event | None] = unwrap
        self._address = address
        self._backoff = backoff
        self._pauses = pauses
        self._call: StreamingCall[Any] = begin()
        self._replies = iter(self._call)

    def __next__(self) -> Event:
        while True:
            try:
                event = self._unwrap(next(self._replies))
            except grpc.RpcError as error:
                if self._cancelled:
                    raise StopIteration from None
                self._begin_again(self._pause_after(error))
                continue
            self._anything = True
            # None: an event kind newer than this client.
            if event is not None:
                self._hear(event)
                return event

    def _begin_again(self, pause: float) -> None:
        self._pauses.wait(pause, lambda: self._cancelled)
        if self._pauses.closed:
            raise closed_here(self._address)
        if not self._cancelled:
            self._call = self._begin()
            self._replies = iter(self._call)
        if self._cancelled:
            # Also where another thread cancelled the call before this one was made.
            self._call.cancel()

    def cancel(self) -> None:
        """Stops the answer. Does nothing to one that has ended."""
        self._cancelled = True
        self._call.cancel()
        self._pauses.wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()


class AsyncStream(Heard, AsyncIterator[Event], Generic[Event]):
    """The events of one answer, as they come. `cancel`, leaving an `async with` block or cancelling the task that
    iterates stops the answer on the server too; the iterator ends then, and the task's cancellation goes on. A call
    that fails raises a `PrefloopError` from `anext`.
    """

    def __init__(
        self,
        begin: Callable[[], AsyncStreamingCall[Reply]],
        unwrap: Callable[[Reply], Event | None],
        *,
        address: str,
        backoff: Backoff,
        pauses: AsyncPauses,
    ) -> None:
        self._begin = begin
        self._unwrap: Callable[[Any], Event | None] = unwrap
        self._address = address
        self._backoff = backoff
        self._pauses = pauses
        self._call: AsyncStreamingCall[Any] = begin()
        self._replies = aiter(self._call)

    async def __anext__(self) -> Event:
        while True:
            try:
                event = self._unwrap(await self._reply())
            except grpc.RpcError as error:
                if self._cancelled:
                    raise StopAsyncIteration from None
                await self._begin_again(self._pause_after(error))
                continue
            self._anything = True
            # None: an event kind newer than this client.
            if event is not None:
                self._hear(event)
                return event

    async def _reply(self) -> Any:
        try:
            return await anext(self._replies)
        except asyncio.CancelledError:
            if task_is_cancelled():
                self.cancel()
                raise
            if self._cancelled:
                raise StopAsyncIteration from None
            raise closed_here(self._address) from None

    async def _begin_again(self, pause: float) -> None:
        await self._pauses.wait(pause, lambda: self._cancelled)
        if self._pauses.closed:
            raise closed_here(self._address)
        if self._cancelled:
            raise StopAsyncIteration
        self._call = self._begin()
        self._replies = aiter(self._call)

    def cancel(self) -> None:
        """Stops the answer. Does nothing to one that has ended."""
        self._cancelled = True
        self._call.cancel()
        self._pauses.wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()


def reply(
    method: grpc.UnaryUnaryMultiCallable[Request, Reply],
    request: Request,
    *,
    timeout: float,
    metadata: Metadata,
    address: str,
    backoff: Backoff,
    pauses: Pauses,
) -> Reply:
    """The answer to a plain call; raises a PrefloopError where it fails."""
    while True:
        try:
            return method(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            failed = from_rpc_error(error, address)
            pause = backoff.pause_after(failed)
            if pause is None:
                raise failed from error
        pauses.wait(pause)
        if pauses.closed:
            raise closed_here(address)


async def async_reply(
    method: grpc.aio.UnaryUnaryMultiCallable[Request, Reply],
    request: Request,
    *,
    timeout: float,
    metadata: Metadata,
    address: str,
    backoff: Backoff,
    pauses: AsyncPauses,
) -> Reply:
    """The answer to a plain call; raises a PrefloopError where it fails."""
    while True:
        try:
            return await method(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            failed = from_rpc_error(error, address)
            pause = backoff.pause_after(failed)
            if pause is None:
                raise failed from error
        except asyncio.CancelledError:
            if task_is_cancelled():
                raise
            raise closed_here(address) from None
        await pauses.wait(pause)
        if pauses.closed:
            raise closed_here(address)


def task_is_cancelled() -> bool:
    """Whether somebody asked the running task to stop, and not only a call of its to."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def chat_event(reply: ChatResponse) -> ChatEvent | None:
    """The event in a reply; None for a kind that this client does not know."""
    match reply.WhichOneof("event"):
        case "started":
            return reply.started
        case "delta":
            return reply.delta
        case "finished":
            return reply.finished
        case _:
            return None


def compare_event(reply: CompareResponse) -> CompareEvent | None:
    """The event in a reply; None for a kind that this client does not know."""
    match reply.WhichOneof("event"):
        case "started":
            return reply.started
        case "delta":
            return reply.delta
        case "finished":
            return reply.finished
        case _:
            return None
