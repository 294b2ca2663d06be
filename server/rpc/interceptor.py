"""The RPC edge: access, limits, validation and error mapping.

One interceptor does all of this for every RPC, so handlers contain none of it. A caller without the right key is
refused before the message is read. The message is awaited here and not by gRPC, which would wait for it forever and
would reveal internals of our code to the caller of a malformed one. A call counts against its caller's limits until its
status is sent: a client that does not read only uses up its own share.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Set
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
from server.shared.errors import DeadlineExceededError, InvalidArgumentError, NoEngineError, ServiceError
from server.store.keys import Caller
from server.telemetry.observation import CALL_ID, Observation, observed
from server.telemetry.safe_traceback import safe_traceback

log = logging.getLogger(__name__)

Call = Callable[[AsyncIterator[bytes], Any], Awaitable[Any]]
# The same, with the timeout of the call.
Answer = Callable[[AsyncIterator[bytes], Any, asyncio.Timeout], Awaitable[Any]]

# Maximum time between a call's headers and its message.
MESSAGE_SECONDS = 10.0
# A caller without a key, who may only check health.
NOBODY = Caller("", "user", has_key=False)


class HandlerContext:
    """The call's context as handlers see it. A write to a disconnected caller raises CancelledError, as gRPC's own
    cancellation would a moment later."""

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
    """Admits calls, passes them to their handlers, and turns exceptions into statuses. Calls of the methods in
    `need_engine` are refused."""

    def __init__(
        self,
        access: Access,
        limits: Limits,
        calls: OpenCalls,
        validate: Callable[[Message], None],
        call_seconds: float,
        need_engine: Set[str] = frozenset(),
    ) -> None:
        self._access = access
        self._limits = limits
        self._calls = calls
        self._validate = validate
        self._call_seconds = call_seconds
        self._need_engine = need_engine
        # By method.
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = self._wrapped(handler, method)
        return self._handlers[method]

    def _wrapped(self, handler: Any, method: str) -> Any:
        """The handler of a method behind everything that a call passes first."""
        answer = self._stream(handler) if handler.request_streaming else self._one_message(handler, method)
        call = self._admitted(answer, method)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(call, None, handler.response_serializer)

    def _admitted(self, answer: Answer, method: str) -> Call:
        """Wrap `answer` so that only callers who may call get there, their limits apply, and errors become statuses."""

        async def call(requests: AsyncIterator[bytes], context: Any) -> Any:
            metadata = dict(context.invocation_metadata() or ())
            with observed(method, metadata) as seen:
                context.set_trailing_metadata(((CALL_ID, seen.call_id),))
                try:
                    caller = self._access.caller(method, metadata) or NOBODY
                    if method in self._need_engine:
                        raise NoEngineError("This server takes votes and has no engine; ask one that samples answers.")
                    with self._limits.admit(caller), calling(caller), self._calls.open(caller.user):
                        try:
                            return await _in_time(answer, requests, context)
                        except Exception as error:
                            await _tell(error, context, seen)
                except ServiceError as error:
                    # Not admitted, or ended because its user is being deleted.
                    await _tell(error, context, seen)

        return call

    def _one_message(self, handler: Any, method: str) -> Answer:
        # Streaming handlers write to their context, so both kinds are called in the same way.
        behaviour = handler.unary_stream or handler.unary_unary

        async def answer(requests: AsyncIterator[bytes], context: Any, limit: asyncio.Timeout) -> Any:
            raw = await anext(aiter(requests), None)
            if raw is None:
                raise InvalidArgumentError("request", "The call has no message.")
            request = _parsed(raw, handler.request_deserializer)
            # Check again: the key may have been revoked before the message arrived.
            self._access.caller(method, dict(context.invocation_metadata() or ()))
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
        raise InvalidArgumentError("request", "The message does not match its protobuf definition.") from error


async def _tell(error: Exception, context: Any, seen: Observation) -> None:
    """End the call with the error's status."""
    if isinstance(error, grpc.aio.AbortError):
        # One of gRPC's own handlers has already set the status.
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
        # The caller has disconnected; gRPC would log the transport error as ours, with a traceback.
        raise asyncio.CancelledError from None
