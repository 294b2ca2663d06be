"""The role that each RPC requires, and the caller that a call's metadata identifies.

Once a key exists, only the metadata `authorization: Bearer KEY` identifies the user. Without keys, which only a server
on loopback allows, `x-user-id` does, and every caller is an operator. A key of an application names its end user in
`x-end-user`.
"""

from typing import Any

from server.shared.errors import PermissionDeniedError, UnauthenticatedError
from server.store.keys import Caller, Credentials, Role, check_user_name
from server.store.store_thread import StoreThread

DEFAULT_USER = "local"
BEARER = "Bearer "
END_USER = "x-end-user"

# None: no key needed. An RPC that is not listed here cannot be called.
ROLES: dict[str, Role | None] = {
    "/prefloop.v1.ChatService/Chat": "user",
    "/prefloop.v1.ChatService/Compare": "user",
    "/prefloop.v1.ChatService/FindResponse": "user",
    "/prefloop.v1.ChatService/ListVersions": "user",
    "/prefloop.v1.ChatService/GetConversation": "user",
    "/prefloop.v1.ChatService/ListConversations": "user",
    "/prefloop.v1.ChatService/DeleteConversation": "user",
    "/prefloop.v1.FeedbackService/SubmitThumb": "user",
    "/prefloop.v1.FeedbackService/SubmitChoice": "user",
    "/prefloop.v1.FeedbackService/SubmitPairChoice": "user",
    "/prefloop.v1.FeedbackService/SubmitCorrection": "user",
    "/prefloop.v1.FeedbackService/SubmitDemonstration": "user",
    "/prefloop.v1.FeedbackService/RetractFeedback": "user",
    "/prefloop.v1.FeedbackService/ListFeedback": "user",
    "/prefloop.v1.AccountService/GetCaller": "user",
    "/prefloop.v1.AccountService/ForgetUser": "user",
    "/prefloop.v1.AccountService/ExportUser": "user",
    "/prefloop.v1.PolicyService/GetActivePolicy": "operator",
    "/prefloop.v1.PolicyService/ListPolicies": "operator",
    "/prefloop.v1.PolicyService/ActivatePolicy": "operator",
    "/prefloop.v1.PolicyService/RollbackPolicy": "operator",
    "/prefloop.v1.PolicyService/ListRounds": "operator",
    "/prefloop.v1.PolicyService/ListRoundSamples": "operator",
    "/prefloop.v1.PolicyService/CountVotes": "operator",
    "/prefloop.v1.PolicyService/GetLearner": "operator",
    "/prefloop.v1.PolicyService/RequestRound": "operator",
    "/prefloop.v1.ReviewService/GetReview": "user",
    "/prefloop.v1.ReviewService/SkipReview": "user",
    # Load balancers check without a key, and balancing clients watch; of too many strangers' calls the oldest ends.
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "user",
}
# What a server without an engine does not do. PolicyService is about the engines of the server that is asked, too.
NEED_ENGINE = frozenset(
    f"/prefloop.v1.{name}" for name in ("ChatService/Chat", "ChatService/Compare", "ChatService/ListVersions")
) | {method for method in ROLES if method.startswith("/prefloop.v1.PolicyService/")}


class Access:
    """Identifies callers by their keys, which it rereads from the store."""

    def __init__(self, store: StoreThread, *, keys_needed: bool) -> None:
        self._store = store
        self._keys_needed = keys_needed
        # Closed until the keys have been read.
        self._credentials = Credentials({}, closed=True, mark=(-1, -1))

    async def refresh(self) -> None:
        """Pick up keys that were created or revoked since the last call."""
        self._credentials = await self._store(lambda store: store.keys.credentials(self._credentials))

    def caller(self, method: str, metadata: dict[str, Any]) -> Caller | None:
        """The caller of `method` ("/package.Service/Method"); None if it needs no key. Raises UnauthenticatedError,
        PermissionDeniedError, and InvalidArgumentError for an x-user-id or x-end-user that cannot be a name."""
        needed = ROLES[method]
        if needed is None:
            return None
        caller = self._identify(metadata)
        if END_USER in metadata:
            caller = caller.on_behalf_of(str(metadata[END_USER]))
        if not caller.may(needed):
            raise PermissionDeniedError(f"{method.rpartition('/')[2]} requires a key with the role {needed}.")
        return caller

    def _identify(self, metadata: dict[str, Any]) -> Caller:
        if not (self._keys_needed or self._credentials.closed):
            user = str(metadata.get("x-user-id", DEFAULT_USER))
            check_user_name(user)
            return Caller(user, "operator", has_key=False)
        given = str(metadata.get("authorization", ""))
        if not given.startswith(BEARER):
            raise UnauthenticatedError("Send an API key in the metadata: `authorization: Bearer KEY`.")
        caller = self._credentials.caller(given.removeprefix(BEARER))
        if caller is None:
            raise UnauthenticatedError("This API key is unknown or was revoked.")
        return caller
