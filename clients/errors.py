"""Exceptions for failed calls. Every message is one sentence that can be shown to a user as it is.

`PrefloopError` is the base. The subclass tells the caller what to do about it; `reason` is the server's
machine-readable constant (for example REQUEST_ID_REUSED), `field` the rejected part of the request. Both may be empty.
`retry_seconds` is the delay the server asked for before a retry, or None; `call_id` is the call's id in the server log.
"""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

# The metadata key for google.rpc.Status. gRPC itself never sets it, so its presence means the server sent the error.
DETAILS_KEY = "grpc-status-details-bin"


class PrefloopError(Exception):
    """Base class of all exceptions that the client raises for a failed call."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        field: str = "",
        retry_seconds: float | None = None,
        call_id: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.field = field
        self.retry_seconds = retry_seconds
        self.call_id = call_id


class UnavailableError(PrefloopError):
    """No server answers, the server is shutting down, or the connection broke. The same call may work later."""


class UntrustedError(PrefloopError):
    """The server's certificate is not trusted: it has expired, is for another name, or its issuer is unknown. A retry
    does not help until that is fixed."""


class TimedOutError(PrefloopError):
    """The deadline passed before the call ended."""


class InvalidRequestError(PrefloopError):
    """The request breaks a rule of the API; sending it again will not help."""


class NotFoundError(PrefloopError):
    """No such conversation, response, comparison, feedback or policy, or it belongs to another user."""


class NotAllowedError(PrefloopError):
    """The API key is missing, invalid, or does not permit the call."""


class ConflictError(PrefloopError):
    """The request is valid but conflicts with the current state, for example a choice before both answers ended."""


class BusyError(PrefloopError):
    """The server is at its limit; try again after a pause."""


class ServerError(PrefloopError):
    """The server failed; its log has the details."""


class NotStartedError(PrefloopError):
    """The stream ended before its answer had started, so there is nothing of it to fetch. Ask again."""


KINDS: dict[grpc.StatusCode, type[PrefloopError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOutError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowedError,
    grpc.StatusCode.UNAUTHENTICATED: NotAllowedError,
    grpc.StatusCode.FAILED_PRECONDITION: ConflictError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: BusyError,
}


# The handshake failures below that a retry cannot fix.
UNTRUSTED = ("Hostname Verification Check failed", "CERTIFICATE_VERIFY_FAILED")
# gRPC's messages for failed handshakes, specific ones before general ones.
HANDSHAKES = {
    "certificate has expired": "The certificate of the server at {} has expired; its operator has to renew it.",
    "certificate is not yet valid": "The certificate of the server at {} is not valid yet; check this machine's clock.",
    "Hostname Verification Check failed": "The certificate of the server at {} is for another name; connect with "
    "the name in the certificate.",
    "CERTIFICATE_VERIFY_FAILED": "The certificate of the server at {} has an unknown issuer; pass the issuer's "
    "certificate with --ca.",
    "WRONG_VERSION_NUMBER": "The server at {} does not use TLS, but this client requires it.",
    "Tls handshake failed": "The TLS handshake with the server at {} failed.",
}


def from_rpc_error(error: grpc.RpcError, address: str, *, heard: bool = False) -> PrefloopError:
    """The exception for a failed call. `heard`: the stream had already delivered an event when it broke."""
    # Every error that a call raises is one of these, although gRPC's type hints do not say so.
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code = error.code() or grpc.StatusCode.UNKNOWN
    status = _rich_status(error)
    message = (status.message if status else "") or error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and status is None and (sentence := _handshake_sentence(message, address)):
        # Other failures may be temporary, for example while a proxy starts, so they are retried.
        untrusted = any(words in message for words in UNTRUSTED)
        return UntrustedError(sentence, code=code) if untrusted else UnavailableError(sentence, code=code)
    if code is grpc.StatusCode.UNAVAILABLE and status is None and _is_transport(message):
        message = _connection_sentence(address, message, heard)
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and status is None:
        message = f"The server at {address} did not finish in time."
    elif code is grpc.StatusCode.CANCELLED and "Channel closed" in message:
        return closed_here(address)
    elif code is grpc.StatusCode.CANCELLED and status is None and "Locally cancelled" not in message:
        # gRPC's server ends a call so that arrives as it stops: it has not begun, or its request_id says that it has.
        return UnavailableError(_connection_sentence(address, message, heard), code=grpc.StatusCode.UNAVAILABLE)
    kind = KINDS.get(code, ServerError)
    return kind(message or f"The call failed with {code.name}.", code=code, **_details(status))


def _handshake_sentence(message: str, address: str) -> str:
    """The sentence for a failed handshake, by gRPC's message; empty if the message is about something else."""
    return next((sentence.format(address) for words, sentence in HANDSHAKES.items() if words in message), "")


def closed_here(address: str) -> UnavailableError:
    """The exception for a call whose connection this program closed."""
    return UnavailableError(f"This program closed the connection to {address}.", code=grpc.StatusCode.CANCELLED)


def _is_transport(message: str) -> bool:
    """Whether the message is gRPC's own. The server's messages are sentences and end with punctuation."""
    return not message.endswith((".", "!", "?"))


def _connection_sentence(address: str, message: str, heard: bool) -> str:
    if heard:
        return f"The connection to {address} broke during the answer; the stored part is in the conversation's history."
    if message.startswith("failed to connect") and message.endswith("Socket closed"):
        return (
            f"The server at {address} closes the connection at once: it may be shutting down, or require TLS (--ca) or "
            "a client certificate (--cert)."
        )
    return f"No server answers at {address}: start one with `server serve`, or pass its --host and --port."


def _rich_status(error: grpc.Call | grpc.aio.AioRpcError) -> Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return Status.FromString(value)
            except DecodeError:
                return None
    return None


def _details(status: Status | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    info, bad_request, retry, request = ErrorInfo(), BadRequest(), RetryInfo(), RequestInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            found["reason"] = info.reason
        elif detail.Unpack(bad_request) and bad_request.field_violations:
            found["field"] = bad_request.field_violations[0].field
        elif detail.Unpack(retry):
            found["retry_seconds"] = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(request):
            found["call_id"] = request.request_id
    return found
