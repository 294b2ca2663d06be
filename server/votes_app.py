"""The server without an engine: it takes votes, and shows and deletes what is stored.

Everything that is to be done once for all, or that needs an engine, is left to the servers that have one: answers, the
pointer, canaries, and cleaning up.
"""

from functools import partial

from prefloop.v1 import account_pb2_grpc, chat_pb2_grpc, feedback_pb2_grpc, policy_pb2_grpc, review_pb2_grpc

from server.admin.retention_task import RetentionTask
from server.engine.base import ModelText
from server.grpc_server import SERVICES, GrpcServer
from server.rpc.access import NEED_ENGINE
from server.rpc.services.account import AccountService
from server.rpc.services.conversations import ConversationService
from server.rpc.services.feedback import FeedbackService
from server.rpc.services.review import ReviewService
from server.turns.deletion import delete_conversation

# An answer that is being written is always another server's.
NOBODY = ""
# The services of which nothing is missing.
WHOLE = [name for name in SERVICES if not any(method.startswith(f"/{name}/") for method in NEED_ENGINE)]


class VotesApp(GrpcServer):
    """The gRPC server over a store alone. Raises ServiceError if the port is in use."""

    async def start(self, text: ModelText) -> None:
        """Start to take votes; `text` counts the tokens of what people write."""
        store, settings, server = self._store, self._settings, self._server
        retention = RetentionTask(store, settings.data_dir, settings.retention_days)
        delete = partial(delete_conversation, store, NOBODY)
        # What is abstract is refused before it is reached, with a reason (`server.rpc.access.NEED_ENGINE`).
        conversations = ConversationService(store, settings.system_prompt, delete, retention)  # type: ignore[abstract]
        policies = policy_pb2_grpc.PolicyServiceServicer()  # type: ignore[abstract]
        chat_pb2_grpc.add_ChatServiceServicer_to_server(conversations, server)
        feedback = FeedbackService(store, text, settings.user_demonstrations)
        feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(feedback, server)
        review_pb2_grpc.add_ReviewServiceServicer_to_server(ReviewService(store), server)
        self._account = AccountService(store, self._access, self._calls, retention, settings.poll_seconds)
        account_pb2_grpc.add_AccountServiceServicer_to_server(self._account, server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(policies, server)
        await self._open(self._account)
        await self._tell_health(True, WHOLE)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, and give open ones `grace` seconds to finish."""
        await self._refuse(grace)
        await self._account.drain()
        await self._end_tasks()
