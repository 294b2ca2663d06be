"""Errors in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

import grpc
from starlette.requests import Request
from starlette.responses import JSONResponse

from clients.asgi.requests import STATUSES
from clients.errors import PrefloopError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# The server's reasons that clients know by a name of OpenAI's.
CODES = {"PROMPT_TOO_LONG": "context_length_exceeded", "UNAUTHENTICATED": "invalid_api_key"}
# The server's fields by the names that they have here.
PARAMS = {
    "message": "messages",
    "system": "messages",
    "x-end-user": "user",
    "text": "correction",
    "policy_version": "model",
    "request_id": "idempotency-key",
    "response_id_a": "id",
    "response_id_b": "other_id",
}
SAMPLING = "sampling."


class GatewayError(Exception):
    """A refusal. `param` names the field of the request, `code` is a constant for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_seconds = retry_seconds

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_seconds is None else {"retry-after": f"{max(1, round(self.retry_seconds))}"}
        return JSONResponse(self.body(), self.status, headers)


def from_call(error: PrefloopError) -> GatewayError:
    """The refusal for a failed call to the server."""
    return GatewayError(
        503 if error.code is grpc.StatusCode.UNAVAILABLE else STATUSES.get(error.code, 500),
        str(error).replace(SAMPLING, ""),
        param=PARAMS.get(error.field, error.field.removeprefix(SAMPLING)) or None,
        code=CODES.get(error.reason, error.reason.lower()) or None,
        retry_seconds=error.retry_seconds,
    )


async def on_gateway_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GatewayError)
    return error.response()


async def on_call_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PrefloopError)
    return from_call(error).response()
