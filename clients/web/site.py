"""State and helpers shared by all handlers, and error pages."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.templating import Jinja2Templates

from clients.asgi.requests import STATUSES
from clients.errors import NotAllowedError, PrefloopError, UnavailableError
from clients.web.rendering import environment
from clients.web.sign_in import Doorkeeper, SignedIn
from clients.web.turns_under_way import TurnsUnderWay

T = TypeVar("T")
AWAY = "The server is away, or just starting. Nothing that was said or voted is lost; try again in a moment."


@dataclass
class Site:
    """The page's own state: sign-in and the turns that are being answered."""

    doorkeeper: Doorkeeper
    turns: TurnsUnderWay = field(default_factory=TurnsUnderWay)
    templates: Jinja2Templates = field(default_factory=lambda: Jinja2Templates(env=environment()))

    async def page(
        self, request: Request, person: SignedIn | None, template: str, *, status: int = 200, **context: Any
    ) -> Response:
        """Renders a whole page, in a thread, since a long conversation would hold up other users' answers."""
        return await asyncio.to_thread(
            self.templates.TemplateResponse, request, template, {"person": person, **context}, status_code=status
        )

    def fragment(self, template: str, **context: Any) -> str:
        """Renders a part of a page."""
        return self.templates.get_template(template).render(**context)


async def enter(request: Request) -> tuple[Site, SignedIn]:
    """The site and the signed-in user of a request. Raises NotAllowedError."""
    site: Site = request.app.state.site
    return site, await site.doorkeeper.enter(request)


async def form_of(request: Request) -> defaultdict[str, str]:
    """The fields of a form; missing ones are empty. Browsers send line endings as CRLF, which become LF."""
    try:
        async with request.form() as form:
            texts = {name: value.replace("\r\n", "\n") for name, value in form.items() if isinstance(value, str)}
    except (LookupError, UnicodeError) as error:
        # The charset is unknown, or the bytes do not match it.
        raise HTTPException(415, "The form's text does not match its declared encoding.") from error
    return defaultdict(str, texts)


async def first(count: int, items: AsyncIterator[T]) -> list[T]:
    """At most `count` of the items."""
    found: list[T] = []
    async for item in items:
        found.append(item)
        if len(found) == count:
            break
    return found


async def on_call_error(request: Request, error: Exception) -> Response:
    """Turns a failed call to the server into an error page or a redirect to sign-in."""
    assert isinstance(error, PrefloopError)
    if isinstance(error, NotAllowedError) and error.code is grpc.StatusCode.UNAUTHENTICATED and request.method == "GET":
        return RedirectResponse("/sign-in", 303)
    if isinstance(error, UnavailableError):
        # The error page reloads itself until the server is back.
        retry = request.url.path if request.method == "GET" else ""
        return await _error_page(request, 503, AWAY, retry=retry, detail=str(error))
    return await _error_page(request, STATUSES.get(error.code, 502), str(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Turns the page's own rejections, and missing pages, into error pages."""
    assert isinstance(error, HTTPException)
    sentence = "There is no such page." if error.status_code == 404 else str(error.detail)
    return await _error_page(request, error.status_code, sentence)


async def _error_page(request: Request, status: int, sentence: str, *, retry: str = "", detail: str = "") -> Response:
    site: Site = request.app.state.site
    about = {"code": status, "sentence": sentence, "retry": retry, "detail": detail}
    return await site.page(request, None, "error.html.j2", status=status, **about)
