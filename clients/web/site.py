"""What every handler works with, and how an error becomes a page."""

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

from clients.errors import NotAllowedError, PrefloopError, UnavailableError
from clients.web.rendering import environment
from clients.web.sign_in import Doorkeeper, SignedIn
from clients.web.turns_under_way import TurnsUnderWay

T = TypeVar("T")
STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
AWAY = "The server is away, or just starting. Nothing that was said or voted is lost; try again in a moment."


@dataclass
class Site:
    """The page's own state: who is who, and what is being answered."""

    doorkeeper: Doorkeeper
    turns: TurnsUnderWay = field(default_factory=TurnsUnderWay)
    templates: Jinja2Templates = field(default_factory=lambda: Jinja2Templates(env=environment()))

    async def page(
        self, request: Request, person: SignedIn | None, template: str, *, status: int = 200, **context: Any
    ) -> Response:
        """A whole page, for whoever looks at it. A long conversation takes a while, in which others' answers go on."""
        return await asyncio.to_thread(
            self.templates.TemplateResponse, request, template, {"person": person, **context}, status_code=status
        )

    def fragment(self, template: str, **context: Any) -> str:
        """A part of one."""
        return self.templates.get_template(template).render(**context)


async def enter(request: Request) -> tuple[Site, SignedIn]:
    """The site, and who asks for something on it. Raises NotAllowedError."""
    site: Site = request.app.state.site
    return site, await site.doorkeeper.enter(request)


async def form_of(request: Request) -> defaultdict[str, str]:
    """The fields of a form; one that was not sent is empty. Browsers send every line's end as CRLF."""
    try:
        async with request.form() as form:
            texts = {name: value.replace("\r\n", "\n") for name, value in form.items() if isinstance(value, str)}
    except (LookupError, UnicodeError) as error:
        # A charset that nobody knows, or bytes that are of another one.
        raise HTTPException(415, "The form says that its texts are in an encoding that they are not in.") from error
    return defaultdict(str, texts)


async def first(count: int, items: AsyncIterator[T]) -> list[T]:
    """At most so many of what comes."""
    found: list[T] = []
    async for item in items:
        found.append(item)
        if len(found) == count:
            break
    return found


async def on_call_error(request: Request, error: Exception) -> Response:
    """A call to the server failed: say so, or ask who it is."""
    assert isinstance(error, PrefloopError)
    if isinstance(error, NotAllowedError) and error.code is grpc.StatusCode.UNAUTHENTICATED and request.method == "GET":
        return RedirectResponse("/sign-in", 303)
    if isinstance(error, UnavailableError):
        # One that the server is away for is asked for again by itself.
        retry = request.url.path if request.method == "GET" else ""
        return await _error_page(request, 503, AWAY, retry=retry, detail=str(error))
    return await _error_page(request, STATUSES.get(error.code, 502), str(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Our own refusal, or a page that is not there."""
    assert isinstance(error, HTTPException)
    sentence = "There is no such page." if error.status_code == 404 else str(error.detail)
    return await _error_page(request, error.status_code, sentence)


async def _error_page(request: Request, status: int, sentence: str, *, retry: str = "", detail: str = "") -> Response:
    site: Site = request.app.state.site
    about = {"code": status, "sentence": sentence, "retry": retry, "detail": detail}
    return await site.page(request, None, "error.html.j2", status=status, **about)
