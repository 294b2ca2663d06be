"""The user's identity: a cookie holds their API key or, on a server without keys, their name.

A key in the cookie serves the same purpose as one in the terminal's environment. No script can read it, and no other
site can send it with a form.
"""

from dataclasses import dataclass

import grpc
from starlette.requests import Request
from starlette.responses import Response

from clients.async_client import AsyncClient
from clients.errors import NotAllowedError

KEY, NAME = "prefloop_key", "prefloop_name"
# How long a message or a vote waits for an unavailable server before the page reports it.
ACTION_SECONDS = 3.0
MONTH_SECONDS = 30 * 24 * 3600
NO_KEYS = (
    "Strangers can reach this page, but the server has no keys to identify them: create one with "
    "`server keys create --user NAME`."
)


@dataclass(frozen=True)
class SignedIn:
    """A user whom the server has accepted."""

    client: AsyncClient
    name: str
    is_operator: bool
    has_key: bool


@dataclass(frozen=True)
class Doorkeeper:
    """Identifies users. `default_name` is the user without a cookie; None if strangers can reach the page, who all need
    a key. `secure`: cookies are sent only over TLS."""

    client: AsyncClient
    default_name: str | None
    secure: bool

    @property
    def _key(self) -> str:
        # With this prefix no sibling domain can set the cookie and so sign the user in as somebody else.
        return f"__Host-{KEY}" if self.secure else KEY

    async def enter(self, request: Request) -> SignedIn:
        """The user who sent a request. Raises NotAllowedError if the server does not accept them."""
        key = request.cookies.get(self._key)
        name = None if key else request.cookies.get(NAME) or self.default_name
        try:
            client = self.client.acting_as(api_key=key, user=name)
        except ValueError as error:
            # Not a cookie that we set.
            raise NotAllowedError(str(error), code=grpc.StatusCode.UNAUTHENTICATED) from error
        if request.method == "POST":
            client.patience = ACTION_SECONDS
        return await self._known(client)

    async def needs_key(self) -> bool:
        """Whether the server identifies users by keys."""
        try:
            await self._known(self.client.acting_as())
        except NotAllowedError:
            return True
        return False

    async def sign_in(self, response: Response, *, key: str = "", name: str = "") -> None:
        """Sets the cookie for a key or name on `response`. Raises NotAllowedError, or ValueError for an invalid one."""
        await self._known(self.client.acting_as(api_key=key) if key else self.client.acting_as(user=name))
        self.sign_out(response)
        response.set_cookie(
            self._key if key else NAME, key or name, MONTH_SECONDS, secure=self.secure, httponly=True, samesite="lax"
        )

    def sign_out(self, response: Response) -> None:
        """Deletes the cookies."""
        # KEY without the prefix may remain from an earlier release.
        for cookie in {self._key, KEY, NAME}:
            response.delete_cookie(cookie, secure=self.secure, httponly=True, samesite="lax")

    async def _known(self, client: AsyncClient) -> SignedIn:
        caller = await client.caller()
        if self.default_name is None and not caller.has_key:
            raise NotAllowedError(NO_KEYS, code=grpc.StatusCode.PERMISSION_DENIED)
        return SignedIn(client, caller.user, caller.role == "operator", caller.has_key)
