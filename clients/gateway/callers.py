"""Who sends a request: the key in its Authorization header alone decides. Cookies are the page's, and not read here."""

import time

import grpc
from starlette.requests import Request

from clients.async_client import AsyncClient
from clients.errors import NotAllowedError
from clients.gateway.errors import GatewayError

NO_KEYS = (
    "Strangers can reach this gateway, but the server has no keys to identify them: create one with "
    "`server keys create --user NAME`."
)
# How often a server without keys is asked whether it still has none. In between it refuses calls by itself.
ASK_SECONDS = 1.0
# Headers that name an end user: as over gRPC, and as Open WebUI sends it.
USER_HEADERS = ("x-end-user", "x-openwebui-user-id")


class Callers:
    """Clients for the callers of requests. `default_name` is the user on a server without keys; None if strangers can
    reach the gateway, who all need a key."""

    def __init__(self, client: AsyncClient, default_name: str | None) -> None:
        self._client = client
        self._default_name = default_name
        self._keys_needed = False
        self._ask_again = 0.0

    async def client(self, request: Request, end_user: str | None = None) -> AsyncClient:
        """A client for the caller, speaking for `end_user` or the one that a header names. Raises GatewayError
        and NotAllowedError."""
        headers = (request.headers[name] for name in USER_HEADERS if name in request.headers)
        end_user = next(headers, None) if end_user is None else end_user
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not await self._need_keys():
            if self._default_name is None:
                raise NotAllowedError(NO_KEYS, code=grpc.StatusCode.PERMISSION_DENIED)
            # OpenAI's clients send a key to any server.
            key = ""
        elif scheme.lower() != "bearer" or not key:
            raise GatewayError(401, "Send an API key: `Authorization: Bearer KEY`.", code="invalid_api_key")
        try:
            return self._client.acting_as(api_key=key or None, user=self._default_name, end_user=end_user)
        except ValueError as error:
            if end_user is not None:
                raise GatewayError(400, "user must be printable ASCII characters.", param="user") from error
            raise GatewayError(401, str(error), code="invalid_api_key") from error

    async def _need_keys(self) -> bool:
        """Whether the server identifies callers by keys."""
        if not self._keys_needed and time.monotonic() >= self._ask_again:
            try:
                await self._client.acting_as(user=self._default_name).caller()
                self._ask_again = time.monotonic() + ASK_SECONDS
            except NotAllowedError:
                # Once it has had a key, it always wants one.
                self._keys_needed = True
        return self._keys_needed
