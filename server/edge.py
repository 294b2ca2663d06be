"""The RPC edge: who calls, may they, is it too much, is the request sound, and what does an error tell.

One interceptor does all of it for every RPC, so that handlers hold none of it. A caller without the right key is
refused before the message is read. The message itself is awaited here and not by gRPC, which would wait for it forever
and would tell a caller of a malformed one how our code is built.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2
from grpc_status import rpc_status

from server.access import Access
from server.calls import Calls
from server.errors import DeadlineExceededError, InvalidArgumentError, ServiceError
from server.identity import Caller, calling
from server.limits import Limits
from server.observation import CALL_ID, observed
from server.status import to_status
from server.trouble import trouble

log = logging.getLogger(__name__)

Answer = Callable[[AsyncIterator[bytes], Any], Awaitable[Any]]

# From a call's headers to its message.
MESSAGE_SECONDS = 10.0
# Serve themselves: what they read and how long they take is not ours to say.
OTHERS = ("/grpc.reflection.", "/grpc.health.")


class Edge(grpc.aio.ServerInterceptor):
    """Admits calls, hands them to their handlers, and turns exceptions into statuses."""

    def __init__(
        self, access: Access, limits: Limits, calls: Calls, validate: Callable[[Message], None], call_seconds: float
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
        method = handler_call_details.method
        try:
            caller = self._access.caller(method, handler_call_details.invocation_metadata)
        except ServiceError as error:
            return _refusal(method, error)
        if caller is None or method.startswith(OTHERS):
            return handler
        if handler.response_streaming:
            call = self._guard(handler.unary_stream, handler.request_deserializer, handler_call_details, caller)
            return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)
        call = self._guard(handler.unary_unary, handler.request_deserializer, handler_call_details, caller)
        return grpc.stream_unary_rpc_method_handler(call, None, handler.response_serializer)

    def _guard(
        self,
        behaviour: Callable[[Any, Any], Awaitable[Any]],
        parse: Callable[[bytes], Message],
        details: grpc.HandlerCallDetails,
        caller: Caller,
    ) -> Answer:
        # Streaming handlers write to their context too, so one guard serves both kinds.
        async def answer(requests: AsyncIterator[bytes], context: Any) -> Any:
            with self._limits.admit(caller, details.method), calling(caller), self._calls.open(caller.user):
                try:
                    async with asyncio.timeout(MESSAGE_SECONDS) as limit:
                        request = await _request(requests, parse)
                        # The message may come long after the call; a key that was revoked meanwhile is one.
                        self._access.caller(details.method, details.invocation_metadata)
                        self._validate(request)
                        limit.reschedule(asyncio.get_running_loop().time() + self._call_seconds)
                        return await behaviour(request, context)
                except TimeoutError as error:
                    if limit.expired():
                        raise DeadlineExceededError("The call or its message took longer than allowed.") from error
                    raise

        return _watched(details.method, answer)


async def _request(requests: AsyncIterator[bytes], parse: Callable[[bytes], Message]) -> Message:
    """The call's one message."""
    raw = await anext(aiter(requests), None)
    if raw is None:
        raise InvalidArgumentError("request", "The call has no message.")
    try:
        return parse(raw)
    except DecodeError as error:
        raise InvalidArgumentError("request", "The message is not what its protobuf definition says.") from error


def _refusal(method: str, error: ServiceError) -> Any:
    async def refuse(requests: Any, context: Any) -> None:
        raise error

    # Of this kind whatever was called: it alone does not wait for a message first.
    return grpc.stream_stream_rpc_method_handler(_watched(method, refuse))


def _watched(method: str, answer: Answer) -> Answer:
    """`answer`, seen to its end, and with its error as a status."""

    async def call(requests: AsyncIterator[bytes], context: Any) -> Any:
        with observed(method, dict(context.invocation_metadata() or ())) as seen:
            context.set_trailing_metadata(((CALL_ID, seen.call_id),))
            try:
                return await answer(requests, context)
            except Exception as error:
                status = to_status(error, seen.call_id)
                seen.code = code_pb2.Code.Name(status.code)
                if not isinstance(error, ServiceError):
                    log.error("%s\n%s", status.message, trouble(error))
                rich = rpc_status.to_status(status)
                await context.abort(rich.code, rich.details, (*rich.trailing_metadata, (CALL_ID, seen.call_id)))

    return call
