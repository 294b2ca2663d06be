"""Who sits before the browser: a cookie holds their API key or, on a server without keys, their name.

A key in a cookie is what a key in the terminal's environment is. No script can read it, and no other site can send it
along with a form.
"""

from dataclasses import dataclass

import grpc
from starlette.requests import Request
from starlette.responses import Response

from clients.async_client import AsyncClient
from clients.errors import NotAllowedError

KEY, NAME = "prefloop_key", "prefloop_name"
# How long a message or a vote waits for a server that is away, before the page says so.
ACTION_SECONDS = 3.0
MONTH_SECONDS = 30 * 24 * 3600
NO_KEYS = (
    "Strangers can reach this page, and the server has no keys to tell them by: make one with "
    "`server keys create --user NAME`."
)


@dataclass(frozen=True)
class SignedIn:
    """Somebody whom the server let in."""

    client: AsyncClient
    name: str
    is_operator: bool
    has_key: bool


@dataclass(frozen=True)
class Doorkeeper:
    """Tells people apart. `default_name` is who comes without a cookie; None where strangers can come, who all need a
    key. `secure`: cookies go over TLS alone."""

    client: AsyncClient
    default_name: str | None
    secure: bool

    @property
    def _key(self) -> str:
        # With this prefix no page of a sibling's name can set it, and sign the reader in as somebody else.
        return f"__Host-{KEY}" if self.secure else KEY

    async def enter(self, request: Request) -> SignedIn:
        """Whoever sent this. Raises NotAllowedError where the server does not know them."""
        key = request.cookies.get(self._key)
        name = None if key else request.cookies.get(NAME) or self.default_name
        try:
            client = self.client.acting_as(api_key=key, user=name)
        except ValueError as error:
            # A cookie that we did not set.
            raise NotAllowedError(str(error), code=grpc.StatusCode.UNAUTHENTICATED) from error
        if request.method == "POST":
            client.patience = ACTION_SECONDS
        return await self._known(client)

    async def needs_key(self) -> bool:
        """Whether the server tells people by keys."""
        try:
            await self._known(self.client.acting_as())
        except NotAllowedError:
            return True
        return False

    async def sign_in(self, response: Response, *, key: str = "", name: str = "") -> None:
        """Remembers a key or a name in `response`. Raises NotAllowedError, and ValueError for what cannot be a name."""
        await self._known(self.client.acting_as(api_key=key) if key else self.client.acting_as(user=name))
        self.sign_out(response)
        response.set_cookie(
            self._key if key else NAME, key or name, MONTH_SECONDS, secure=self.secure, httponly=True, samesite="lax"
        )

    def sign_out(self, response: Response) -> None:
        """Forgets whoever it was."""
        # KEY itself may be there from an earlier release.
        for cookie in {self._key, KEY, NAME}:
            response.delete_cookie(cookie, secure=self.secure, httponly=True, samesite="lax")

    async def _known(self, client: AsyncClient) -> SignedIn:
        caller = await client.caller()
        if self.default_name is None and not caller.has_key:
            raise NotAllowedError(NO_KEYS, code=grpc.StatusCode.PERMISSION_DENIED)
        return SignedIn(client, caller.user, caller.role == "operator", caller.has_key)
