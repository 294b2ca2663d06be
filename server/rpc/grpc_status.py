"""Maps errors to gRPC statuses.

Each status carries google.rpc details: ErrorInfo with a constant reason, BadRequest with every invalid field, RetryInfo
if a retry makes sense, and RequestInfo with the call id that is in the log.
"""

from typing import Any

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from server.shared.errors import (
    ConflictError,
    DatabaseError,
    DataDirectoryError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NoEngineError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)

DOMAIN = "prefloop"
RETRY_SECONDS = 1.0


def to_status(error: Exception, call_id: str) -> status_pb2.Status:
    """The google.rpc.Status of an error. Errors other than ServiceError reveal no internals."""
    status = _known(error)
    status.details.append(_packed(error_details_pb2.RequestInfo(request_id=call_id)))
    return status


def _known(error: Exception) -> status_pb2.Status:
    match error:
        case InvalidArgumentError():
            violations = [
                error_details_pb2.BadRequest.FieldViolation(field=field, description=sentence)
                for field, sentence in error.violations
            ]
            details = [_info(error.reason), error_details_pb2.BadRequest(field_violations=violations)]
            return _status(code_pb2.INVALID_ARGUMENT, str(error), details)
        case UnauthenticatedError():
            return _status(code_pb2.UNAUTHENTICATED, str(error), [_info("UNAUTHENTICATED")])
        case PermissionDeniedError():
            return _status(code_pb2.PERMISSION_DENIED, str(error), [_info("PERMISSION_DENIED")])
        case ResourceExhaustedError():
            details = [_info(error.reason)]
            if error.retry_seconds is not None:
                details.append(_retry(error.retry_seconds))
            return _status(code_pb2.RESOURCE_EXHAUSTED, str(error), details)
        case DeadlineExceededError():
            return _status(code_pb2.DEADLINE_EXCEEDED, str(error), [_info("DEADLINE_EXCEEDED")])
        case NotFoundError():
            return _status(code_pb2.NOT_FOUND, str(error), [_info("NOT_FOUND")])
        case FailedPreconditionError():
            return _status(code_pb2.FAILED_PRECONDITION, str(error), [_info(error.reason)])
        case NoEngineError():
            return _status(code_pb2.UNIMPLEMENTED, str(error), [_info("NO_ENGINE")])
        case ConflictError():
            return _status(code_pb2.ABORTED, str(error), [_info("CONFLICT")])
        case UnavailableError() | DataDirectoryError():
            return _status(code_pb2.UNAVAILABLE, str(error), [_info("UNAVAILABLE"), _retry()])
        case DatabaseError(kind="damaged"):
            message = "The database is damaged. Nothing from this call was stored; retrying will not help."
            return _status(code_pb2.DATA_LOSS, message, [_info("STORE_DAMAGED")])
        case DatabaseError(kind="full"):
            message = "The server's disk is full; its operator must free some space. Nothing from this call was stored."
            return _status(code_pb2.UNAVAILABLE, message, [_info("STORE_FULL"), _retry()])
        case DatabaseError():
            message = "The data directory could not be written. Nothing from this call was stored."
            return _status(code_pb2.UNAVAILABLE, message, [_info("STORE_UNAVAILABLE"), _retry()])
        case _ if type(error).__name__ == "EngineDeadError":
            return _status(code_pb2.UNAVAILABLE, "The engine stopped.", [_info("ENGINE_DEAD"), _retry()])
        case _:
            return _status(code_pb2.INTERNAL, "Internal error; the server's log has the cause.", [])


def _status(code: code_pb2.Code.ValueType, message: str, details: list[Message]) -> status_pb2.Status:
    return status_pb2.Status(code=int(code), message=message, details=[_packed(detail) for detail in details])


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _info(reason: str) -> Any:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


def _retry(seconds: float = RETRY_SECONDS) -> Any:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)
