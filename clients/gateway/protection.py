"""What every request must pass before it is read: its host, the site that it comes from, its type, length and rate.

A browser sends requests for any site that it shows, so those of other sites are refused, except of the origins that the
operator allows (CORS). No cookie is read, but on a loopback server without keys a request needs no other credentials.
"""

import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from throttled import MemoryStore, RateLimiterType, Throttled, per_min

from clients.asgi.requests import bounded, from_this_site
from clients.gateway.errors import GatewayError

# The longest that the server would read.
MAX_BODY_BYTES = 4 * 2**20
# Requests per minute with one key, which an application's users share, and refused keys per minute and address.
KEY_RATE, FAILURE_RATE = 6000, 60
# Keys and addresses whose rate is tracked.
TRACKED = 100_000


class Protection:
    """Refuses requests in OpenAI's shape. `hosts` are the accepted host names, `origins` other sites that may call."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(hosts)
        self._origins = frozenset(origins)
        self._by_key, self._failures = _rate(KEY_RATE), _rate(FAILURE_RATE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, address = Headers(scope=scope), (scope.get("client") or ("",))[0]
        try:
            self._check(scope["method"], headers, address)
        except GatewayError as error:
            await error.response()(scope, receive, send)
            return

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 401:
                self._failures.limit(address)
            await send(message)

        too_large = GatewayError(413, f"The body has more than {MAX_BODY_BYTES} bytes.")
        await self._app(scope, bounded(receive, MAX_BODY_BYTES, too_large), send_and_count)

    def _check(self, method: str, headers: Headers, address: str) -> None:
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if host not in self._hosts:
            raise GatewayError(400, f"This gateway does not serve the host {host!r}.")
        if headers.get("origin") not in self._origins and not from_this_site(headers):
            raise GatewayError(403, "This request was sent by another site, which is not among the allowed origins.")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise GatewayError(415, "The content type must be application/json.")
        if self._failures.peek(address).remaining == 0:
            raise GatewayError(429, "Too many requests with invalid keys came from this address.", retry_seconds=60)
        if (turn := self._by_key.limit(headers.get("authorization") or address)).limited:
            sentence = f"The limit is {KEY_RATE} requests per minute and key."
            raise GatewayError(429, sentence, retry_seconds=turn.state.retry_after)


def _rate(limit: int) -> Throttled:
    store = MemoryStore(options={"MAX_SIZE": TRACKED})
    return Throttled(using=RateLimiterType.GCRA.value, quota=per_min(limit), store=store)
