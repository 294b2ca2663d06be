"""The RPC edge: who calls, is the request sound, and what an error is called in gRPC's words.

One interceptor does all three for every RPC, so that handlers hold none of it. Errors carry google.rpc details:
ErrorInfo with a constant reason, BadRequest with the field, RetryInfo where trying again makes sense.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from server.database import DatabaseError
from server.errors import (
    ConflictError,
    DataDirectoryError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)

log = logging.getLogger(__name__)

DOMAIN = "prefloop"
RETRY_SECONDS = 1
# gRPC's own services: no user, no rules of ours.
OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")


def to_status(error: Exception) -> status_pb2.Status:
    """The google.rpc.Status of an error. What is not a ServiceError tells nothing of the inside."""
    match error:
        case InvalidArgumentError():
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
            details = [_info(error.reason), error_details_pb2.BadRequest(field_violations=[violation])]
            return _status(code_pb2.INVALID_ARGUMENT, str(error), details)
        case NotFoundError():
            return _status(code_pb2.NOT_FOUND, str(error), [_info("NOT_FOUND")])
        case FailedPreconditionError():
            return _status(code_pb2.FAILED_PRECONDITION, str(error), [_info(error.reason)])
        case ConflictError():
            return _status(code_pb2.ABORTED, str(error), [_info("CONFLICT")])
        case UnavailableError() | DataDirectoryError():
            return _status(code_pb2.UNAVAILABLE, str(error), [_info("UNAVAILABLE"), _retry()])
        case DatabaseError():
            message = "The data directory could not be written; nothing of this call was kept."
            return _status(code_pb2.UNAVAILABLE, message, [_info("STORE_UNAVAILABLE"), _retry()])
        case _ if type(error).__name__ == "EngineDeadError":
            return _status(code_pb2.UNAVAILABLE, "The engine stopped.", [_info("ENGINE_DEAD"), _retry()])
        case _:
            return _status(code_pb2.INTERNAL, "Something went wrong in the server; its log says what.", [])


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Validates each request and turns exceptions into statuses."""

    def __init__(self, validate: Callable[[Message], None]) -> None:
        self._validate = validate

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN_SERVICES):
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._guard(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guard(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def _guard(self, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        # Streaming handlers write to their context too, so one guard serves both kinds.
        async def call(request: Message, context: Any) -> Any:
            try:
                self._validate(request)
                return await behaviour(request, context)
            except Exception as error:
                return await _abort(context, error)

        return call


async def _abort(context: Any, error: Exception) -> Any:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = to_status(error)
    if not isinstance(error, ServiceError):
        log.error("%s", status.message, exc_info=error)
    await context.abort_with_status(rpc_status.to_status(status))


def _status(code: code_pb2.Code.ValueType, message: str, details: list[Message]) -> status_pb2.Status:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=int(code), message=message, details=packed)


def _info(reason: str) -> Any:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


def _retry() -> Any:
    return error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=RETRY_SECONDS))
