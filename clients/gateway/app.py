"""The ASGI application: routes, middleware and shared state."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from clients.async_client import AsyncClient
from clients.channel import Tls
from clients.errors import PrefloopError
from clients.gateway import completions, feedback, models
from clients.gateway.callers import Callers
from clients.gateway.errors import GatewayError, on_call_error, on_gateway_error
from clients.gateway.protection import Protection

PREFIX = "/v1/"
SERVED = "/v1/chat/completions, /v1/models and /v1/feedback"


def make_gateway(
    address: str,
    *,
    hosts: Sequence[str],
    default_name: str | None,
    origins: Sequence[str] = (),
    tls: Tls | None = None,
) -> Starlette:
    """The gateway to the server at `address`.

    `hosts` are the accepted host names. `default_name` is the user on a server without keys; None if strangers can
    reach the gateway. `origins` are sites whose scripts may call it.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Callers retry by themselves, and are told at once that the server is away.
        async with AsyncClient(address, tls=tls, patience=0.0) as client:
            app.state.callers = Callers(client, default_name)
            yield

    return Starlette(
        routes=[
            Route("/v1/chat/completions", completions.chat_completions, methods=["POST"]),
            Route("/v1/models", models.list_models),
            Route("/v1/models/{model}", models.get_model),
            Route("/v1/feedback", feedback.submit, methods=["POST"]),
            Route("/v1/feedback/{feedback_id}", feedback.retract, methods=["DELETE"]),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["retry-after"],
            ),
            Middleware(Protection, hosts=hosts, origins=origins),
        ],
        exception_handlers={
            GatewayError: on_gateway_error,
            PrefloopError: on_call_error,
            HTTPException: on_http_error,
            Exception: on_failure,
        },
        lifespan=lifespan,
    )


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Missing paths and wrong methods."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    return GatewayError(error.status_code, f"{path} is not served; {SERVED} are.", code="unknown_url").response()


async def on_failure(request: Request, error: Exception) -> JSONResponse:
    """Whatever else went wrong; the log has its traceback."""
    return GatewayError(500, "Internal error; the gateway's log has the cause.").response()
