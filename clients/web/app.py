"""The ASGI application: routes, middleware and shared state."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from clients.async_client import AsyncClient
from clients.channel import Tls
from clients.errors import PrefloopError
from clients.web import account, board, chat, review
from clients.web.protection import Protection
from clients.web.sign_in import Doorkeeper
from clients.web.site import Site, on_call_error, on_http_error


def make_app(
    address: str, *, hosts: list[str], default_name: str | None, secure: bool = False, tls: Tls | None = None
) -> Starlette:
    """The pages of the server at `address`.

    `hosts` are the accepted host names; any other name could belong to an attacker who points it here. `default_name`
    is the user without a cookie on a server without keys; None if strangers can reach the page.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Pages are not delayed by retries: they report an unavailable server at once and reload themselves.
        async with AsyncClient(address, tls=tls, patience=0.0) as client:
            app.state.site = site = Site(Doorkeeper(client, default_name, secure))
            try:
                yield
            finally:
                await site.turns.close()

    static = StaticFiles(directory=Path(__file__).with_name("static"))
    return Starlette(
        routes=[*chat.ROUTES, *review.ROUTES, *account.ROUTES, *board.ROUTES, Mount("/static", static, name="static")],
        middleware=[Middleware(Protection), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={PrefloopError: on_call_error, HTTPException: on_http_error},
        lifespan=lifespan,
    )
