"""What a call can fail with. Every message is one sentence that may be shown to a person as it is.

`PrefloopError` is the base. The subclass says what the caller can do about it; `reason` is the server's constant for
programs (for example REQUEST_ID_REUSED), `field` the part of the request that was refused. Both may be empty.
`retry_seconds` is when the server says to try again, None where it does not, `call_id` what its log calls the call.
"""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

# Where a server puts google.rpc.Status; gRPC itself never sets it, so its presence means that the server spoke.
DETAILS_KEY = "grpc-status-details-bin"


class PrefloopError(Exception):
    """Base of everything the client library raises for a failed call."""

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
    """No server answers, it is going down, or the connection broke. The same call may work later."""


class UntrustedError(PrefloopError):
    """The server's certificate is not one to trust: it has expired, is for another name, or is signed by nobody known.
    Trying again does not help before that is mended."""


class TimedOutError(PrefloopError):
    """The deadline passed before the call ended."""


class InvalidRequestError(PrefloopError):
    """The request breaks a rule of the API; sending it again will not help."""


class NotFoundError(PrefloopError):
    """No such conversation, response, comparison, feedback or policy, or it belongs to somebody else."""


class NotAllowedError(PrefloopError):
    """The API key is missing, is not valid, or does not permit this."""


class ConflictError(PrefloopError):
    """The request is sound but does not fit the present state, for example a choice before both answers ended."""


class BusyError(PrefloopError):
    """The server has as much work as it takes; try again after a pause."""


class ServerError(PrefloopError):
    """The server failed; its log says more."""


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


# Of the handshakes below, those that no waiting mends.
UNTRUSTED = ("Hostname Verification Check failed", "CERTIFICATE_VERIFY_FAILED")
# What the transport says of a handshake that failed, the special before the general.
HANDSHAKES = {
    "certificate has expired": "The certificate of the server at {} has expired; whoever runs it has to renew it.",
    "certificate is not yet valid": "The certificate of the server at {} is not valid yet; is the clock right here?",
    "Hostname Verification Check failed": "The certificate of the server at {} was made for another name; connect by "
    "the name that it was made for.",
    "CERTIFICATE_VERIFY_FAILED": "The certificate of the server at {} is signed by nobody who is known here; give the "
    "certificate of who signed it with --ca.",
    "WRONG_VERSION_NUMBER": "The server at {} was asked for TLS and speaks without.",
    "Tls handshake failed": "The server at {} and this program agree on no encrypted connection.",
}


def from_rpc_error(error: grpc.RpcError, address: str, *, heard: bool = False) -> PrefloopError:
    """The exception for a failed call. `heard`: the stream had already brought something when it broke."""
    # Every error that a call raises is one of these; gRPC's types do not say so.
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    code = error.code() or grpc.StatusCode.UNKNOWN
    status = _rich_status(error)
    message = (status.message if status else "") or error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and status is None and (sentence := _handshake_sentence(message, address)):
        # What may pass, a proxy that starts say, is waited for.
        untrusted = any(words in message for words in UNTRUSTED)
        return UntrustedError(sentence, code=code) if untrusted else UnavailableError(sentence, code=code)
    if code is grpc.StatusCode.UNAVAILABLE and status is None and _is_transport(message):
        message = _connection_sentence(address, message, heard)
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and status is None:
        message = f"The server at {address} did not finish in time."
    elif code is grpc.StatusCode.CANCELLED and "Channel closed" in message:
        return closed_here(address)
    kind = KINDS.get(code, ServerError)
    return kind(message or f"The call failed with {code.name}.", code=code, **_details(status))


def _handshake_sentence(message: str, address: str) -> str:
    """What kept an encrypted connection from coming about, by the words of gRPC's transport; empty where it was not
    that."""
    return next((sentence.format(address) for words, sentence in HANDSHAKES.items() if words in message), "")


def closed_here(address: str) -> UnavailableError:
    """For a call whose connection this program closed under it."""
    return UnavailableError(f"The connection to {address} was closed here.", code=grpc.StatusCode.CANCELLED)


def _is_transport(message: str) -> bool:
    """Whether gRPC's transport wrote this message. A server's own words are sentences and end like one."""
    return not message.endswith((".", "!", "?"))


def _connection_sentence(address: str, message: str, heard: bool) -> str:
    if heard:
        return f"The connection to {address} broke during the answer; the conversation's history has what was kept."
    if message.startswith("failed to connect") and message.endswith("Socket closed"):
        return (
            f"The server at {address} ends the connection at once: it may be going down, or want TLS (--ca) or a "
            "certificate of yours (--cert)."
        )
    return f"No server answers at {address}: start one with `server serve`, or give its --host and --port."


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
