"""Security middleware: response headers against embedding and scripting, and checks of submitted forms."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clients.asgi.requests import bounded, from_this_site

# Only our own files, no inline scripts or styles; HTML is inserted only through one named policy in static/page.js.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types prefloop",
    ]
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
# Forms are read before the API key is checked. A message of 16,000 characters, all of them emoji, takes 192 kB.
MAX_FORM_BYTES = 2**20


class Protection:
    """Sets HEADERS on every response, and rejects cross-site forms and requests that are too long."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                # Conversations are never cached; our own files are cached but revalidated.
                headers.setdefault("cache-control", "no-cache" if scope["path"].startswith("/static/") else "no-store")
            await send(message)

        changes = scope["method"] not in ("GET", "HEAD")
        if changes and not from_this_site(Headers(scope=scope)):
            refusal = PlainTextResponse("This form was sent by another site.", 403)
            await refusal(scope, receive, send_protected)
        else:
            too_large = HTTPException(413, "The request is too large.")
            await self._app(scope, bounded(receive, MAX_FORM_BYTES, too_large), send_protected)
