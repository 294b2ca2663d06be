"""The RPC edge: who calls, may they, is it too much, is the request sound, and what does an error tell.

One interceptor does all of it for every RPC, so that handlers hold none of it. A caller without the right key is
refused before the message is read. The message itself is awaited here and not by gRPC, which would wait for it forever
and would tell a caller of a malformed one how our code is built. A call counts against its caller's limits until its
status is out: a client that reads nothing holds up its own share alone.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2
from grpc_status import rpc_status

from server.rpc.access import Access
from server.rpc.grpc_status import to_status
from server.rpc.identity import calling
from server.rpc.limits import Limits
from server.rpc.open_calls import OpenCalls
from server.shared.errors import DeadlineExceededError, InvalidArgumentError, ServiceError
from server.store.keys import Caller
from server.telemetry.observation import CALL_ID, Observation, observed
from server.telemetry.safe_traceback import safe_traceback

log = logging.getLogger(__name__)

Call = Callable[[AsyncIterator[bytes], Any], Awaitable[Any]]
# The same, told by when it must end.
Answer = Callable[[AsyncIterator[bytes], Any, asyncio.Timeout], Awaitable[Any]]

# From a call's headers to its message.
MESSAGE_SECONDS = 10.0
# A caller without a key, who may ask for health only.
NOBODY = Caller("", "user", has_key=False)


class HandlerContext:
    """The call's context as handlers see it. A write to a caller who has gone raises CancelledError, as the
    cancellation that gRPC sends a moment later would."""

    def __init__(self, context: Any) -> None:
        self._context = context

    async def write(self, message: Any) -> None:
        try:
            await self._context.write(message)
        except Exception as error:
            # The class is not public in grpc.
            if type(error).__name__ != "ExecuteBatchError":
                raise
            raise asyncio.CancelledError from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class Interceptor(grpc.aio.ServerInterceptor):
    """Admits calls, hands them to their handlers, and turns exceptions into statuses."""

    def __init__(
        self, access: Access, limits: Limits, calls: OpenCalls, validate: Callable[[Message], None], call_seconds: float
    ) -> None:
        self._access = access
        self._limits = limits
        self._calls = calls
        self._validate = validate
        self._call_seconds = call_seconds

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        details = handler_call_details
        try:
            caller = self._access.caller(details.method, details.invocation_metadata) or NOBODY
        except ServiceError as error:
            return _refusal(details.method, error)
        answer = self._stream(handler) if handler.request_streaming else self._one_message(handler, details)
        call = self._admitted(answer, details.method, caller)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(call, None, handler.response_serializer)

    def _admitted(self, answer: Answer, method: str, caller: Caller) -> Call:
        """`answer` for a caller within their limits, and with its error as a status."""

        async def call(requests: AsyncIterator[bytes], context: Any) -> Any:
            with observed(method, dict(context.invocation_metadata() or ())) as seen:
                context.set_trailing_metadata(((CALL_ID, seen.call_id),))
                try:
                    with self._limits.admit(caller), calling(caller), self._calls.open(caller.user):
                        try:
                            return await _in_time(answer, requests, context)
                        except Exception as error:
                            await _tell(error, context, seen)
                except ServiceError as error:
                    # Not admitted, or ended because its user is forgotten.
                    await _tell(error, context, seen)

        return call

    def _one_message(self, handler: Any, details: grpc.HandlerCallDetails) -> Answer:
        # Streaming handlers write to their context, so one way serves both kinds.
        behaviour = handler.unary_stream or handler.unary_unary

        async def answer(requests: AsyncIterator[bytes], context: Any, limit: asyncio.Timeout) -> Any:
            raw = await anext(aiter(requests), None)
            if raw is None:
                raise InvalidArgumentError("request", "The call has no message.")
            request = _parsed(raw, handler.request_deserializer)
            # The message may come long after the call; a key that was revoked meanwhile is one.
            self._access.caller(details.method, details.invocation_metadata)
            self._validate(request)
            self._go_on(limit)
            return await behaviour(request, HandlerContext(context))

        return answer

    def _stream(self, handler: Any) -> Answer:
        """Reflection, the one RPC with a stream of requests."""

        async def answer(requests: AsyncIterator[bytes], context: Any, limit: asyncio.Timeout) -> None:
            self._go_on(limit)
            parsed = (_parsed(raw, handler.request_deserializer) async for raw in requests)
            async for response in handler.stream_stream(parsed, context):
                await context.write(response)

        return answer

    def _go_on(self, limit: asyncio.Timeout) -> None:
        limit.reschedule(asyncio.get_running_loop().time() + self._call_seconds)


async def _in_time(answer: Answer, requests: AsyncIterator[bytes], context: Any) -> Any:
    try:
        async with asyncio.timeout(MESSAGE_SECONDS) as limit:
            return await answer(requests, context, limit)
    except TimeoutError as error:
        if limit.expired():
            raise DeadlineExceededError("The call or its message took longer than allowed.") from error
        raise


def _parsed(raw: bytes, parse: Callable[[bytes], Message]) -> Message:
    try:
        return parse(raw)
    except DecodeError as error:
        raise InvalidArgumentError("request", "The message is not what its protobuf definition says.") from error


def _refusal(method: str, error: ServiceError) -> Any:
    async def refuse(requests: Any, context: Any) -> None:
        with observed(method, dict(context.invocation_metadata() or ())) as seen:
            await _tell(error, context, seen)

    # Of this kind whatever was called: it alone does not wait for a message first.
    return grpc.stream_stream_rpc_method_handler(refuse)


async def _tell(error: Exception, context: Any, seen: Observation) -> None:
    """Ends the call with the error's status."""
    if isinstance(error, grpc.aio.AbortError):
        # A handler of gRPC's own told it already.
        seen.code = getattr(context.code(), "name", "UNKNOWN")
        raise error
    status = to_status(error, seen.call_id)
    seen.code = code_pb2.Code.Name(status.code)
    if not isinstance(error, ServiceError):
        log.error("%s\n%s", status.message, safe_traceback(error))
    rich = rpc_status.to_status(status)
    try:
        await context.abort(rich.code, rich.details, (*rich.trailing_metadata, (CALL_ID, seen.call_id)))
    except grpc.aio.AbortError:
        raise
    except Exception:
        # The caller is gone; gRPC would log the transport's error as ours, with a traceback.
        raise asyncio.CancelledError from None
