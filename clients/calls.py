"""One call to the server, for threads and for asyncio. All differences between gRPC's two Python interfaces are here.

A call that finds no server is retried for as long as its `Backoff` allows (`clients.retries`). A stream is retried only
until its first event, since a second answer must not follow half of the first one.

A stream that the client cancels simply ends. grpc.aio reports that with the same CancelledError that cancels a task, so
the state of the task decides: if the task is being cancelled, the error is raised and the stream is cancelled on the
server too.
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
    """The ids that a stream has delivered so far. They are empty before the Started event, and `response_id` or
    `comparison_id` stays empty in a stream of the other kind."""

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
        """Seconds until the retry. Raises the PrefloopError if there is none."""
        failed = from_rpc_error(error, self._address, heard=self._anything)
        pause = None if self._anything else self._backoff.pause_after(failed)
        if pause is None:
            raise failed from error
        return pause


class Stream(Heard, Iterator[Event], Generic[Event]):
    """The events of one answer as they arrive. `cancel` (from any thread) or leaving a `with` block stops the answer on
    the server too; the iterator then simply ends. A failed call raises a `PrefloopError` from `next`.
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
            # None: a kind of event that this client does not know.
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
            # Another thread may have cancelled the previous call before this one was made.
            self._call.cancel()

    def cancel(self) -> None:
        """Stops the answer. Does nothing if it has ended."""
        self._cancelled = True
        self._call.cancel()
        self._pauses.wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()


class AsyncStream(Heard, AsyncIterator[Event], Generic[Event]):
    """The events of one answer as they arrive. `cancel`, leaving an `async with` block or cancelling the iterating task
    stops the answer on the server too. The iterator then ends; a cancelled task stays cancelled. A failed call raises a
    `PrefloopError` from `anext`.
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
            # None: a kind of event that this client does not know.
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
        """Stops the answer. Does nothing if it has ended."""
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
    """The response to a unary call. Raises a PrefloopError if it fails."""
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
    """The response to a unary call. Raises a PrefloopError if it fails."""
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
    """Whether the running task itself is being cancelled, not only one of its calls."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def chat_event(reply: ChatResponse) -> ChatEvent | None:
    """The event in a reply, or None for a kind that this client does not know."""
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
    """The event in a reply, or None for a kind that this client does not know."""
    match reply.WhichOneof("event"):
        case "started":
            return reply.started
        case "delta":
            return reply.delta
        case "finished":
            return reply.finished
        case _:
            return None
