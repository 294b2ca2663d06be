"""The server without an engine: it takes votes, and shows and deletes what is stored.

Everything that is to be done once for all, or that needs an engine, is left to the servers that have one: answers, the
pointer, canaries, and cleaning up.
"""

from functools import partial

from prefloop.v1 import policy_pb2_grpc

from server.engine.base import ModelText
from server.grpc_server import SERVICES, GrpcServer
from server.rpc.access import NEED_ENGINE
from server.rpc.services.conversations import ConversationService
from server.turns.deletion import delete_conversation

# An answer that is being written is always another server's.
NOBODY = ""
# The services of which nothing is missing.
WHOLE = [name for name in SERVICES if not any(method.startswith(f"/{name}/") for method in NEED_ENGINE)]


class VotesApp(GrpcServer):
    """The gRPC server over a store alone. Raises ServiceError if the port is in use."""

    async def start(self, text: ModelText) -> None:
        """Start to take votes; `text` counts the tokens of what people write."""
        store, prompt = self._store, self._settings.system_prompt
        delete = partial(delete_conversation, store, NOBODY)
        # What is abstract is refused before it is reached, with a reason (`server.rpc.access.NEED_ENGINE`).
        conversations = ConversationService(store, prompt, delete, self._retention)  # type: ignore[abstract]
        policies = policy_pb2_grpc.PolicyServiceServicer()  # type: ignore[abstract]
        await self._open(conversations, policies, text)
        await self._tell_health(True, WHOLE)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, and give open ones `grace` seconds to finish."""
        await self._refuse(grace)
        await self._account.drain()
        await self._end_tasks()
