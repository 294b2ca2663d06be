"""The part of ChatService that is about what was said, and needs no engine."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2

from server.admin.retention_task import RetentionTask
from server.rpc import to_proto
from server.rpc.identity import current_user
from server.rpc.paging import CHUNK, fill
from server.rpc.validation import MAX_PAGE_SIZE
from server.shared.errors import NotFoundError
from server.shared.model.prompt import Said
from server.store.chats.histories import OwnHistory
from server.store.store import Store
from server.store.store_thread import StoreThread


class ConversationService(chat_pb2_grpc.ChatServiceServicer):
    """Shows and deletes stored conversations. `delete` is called with a user and a conversation's id."""

    def __init__(
        self,
        store: StoreThread,
        system_prompt: str,
        delete: Callable[[str, str], Awaitable[None]],
        retention: RetentionTask,
    ) -> None:
        self._store = store
        self._system_prompt = system_prompt
        self._delete = delete
        self._retention = retention

    async def FindResponse(self, request: chat_pb2.FindResponseRequest, context: Any) -> chat_pb2.FindResponseResponse:
        user = current_user()
        *said, answer = request.messages
        system, history, text = own_history(request.system if request.HasField("system") else None, said)
        own = OwnHistory(self._system_prompt if system is None else system, history, text)
        found = await self._store.read(lambda store: store.histories.response(user, own, answer.content))
        if found is None:
            raise NotFoundError("response", "with these messages")
        return chat_pb2.FindResponseResponse(response_id=found)

    async def GetConversation(
        self, request: chat_pb2.GetConversationRequest, context: Any
    ) -> chat_pb2.GetConversationResponse:
        user, conversation_id = current_user(), request.conversation_id
        size = request.page_size or MAX_PAGE_SIZE
        key = to_proto.page_key(request.page_token, (int,))

        def entries(store: Store) -> Iterator[tuple[list[Any], chat_pb2.Turn]]:
            after = key[0] if key else 0
            while turns := store.conversations.turns(user, conversation_id, CHUNK, after):
                votes = store.feedback.on_turns(user, turns)
                for turn in turns:
                    yield [turn.seq], to_proto.turn(turn, votes)
                after = turns[-1].seq

        def read(store: Store) -> chat_pb2.GetConversationResponse:
            conversation = to_proto.conversation(store.conversations.get(user, conversation_id))
            turns, more = fill(entries(store), size)
            conversation.turns.extend(turns)
            return chat_pb2.GetConversationResponse(conversation=conversation, next_page_token=more)

        return await self._store.read(read)

    async def ListConversations(
        self, request: chat_pb2.ListConversationsRequest, context: Any
    ) -> chat_pb2.ListConversationsResponse:
        user = current_user()
        size = request.page_size or to_proto.DEFAULT_PAGE_SIZE
        key = to_proto.page_key(request.page_token, (float, str))
        before = (key[0], key[1]) if key else None
        # One more than the page, to know whether there is a next one.
        found = await self._store.read(lambda store: store.conversations.page(user, size + 1, before))
        page = found[:size]
        more = to_proto.page_token([page[-1].update_time, page[-1].id]) if len(found) > size else ""
        return chat_pb2.ListConversationsResponse(
            conversations=[to_proto.conversation(record) for record in page], next_page_token=more
        )

    async def DeleteConversation(
        self, request: chat_pb2.DeleteConversationRequest, context: Any
    ) -> chat_pb2.DeleteConversationResponse:
        await self._delete(current_user(), request.conversation_id)
        await self._retention.erase()
        return chat_pb2.DeleteConversationResponse()


def own_history(system: str | None, messages: Sequence[feedback_pb2.Message]) -> tuple[str | None, list[Said], str]:
    """What a caller's valid `messages` say: the system prompt, `system` if they have none, the turns before the last
    message, and that."""
    *before, last = messages
    if before and before[0].role == feedback_pb2.ROLE_SYSTEM:
        system = before.pop(0).content
    # An answer that comes first has no message.
    asked = [""] if before and before[0].role == feedback_pb2.ROLE_ASSISTANT else []
    asked += [one.content for one in before if one.role == feedback_pb2.ROLE_USER]
    answers = [one.content for one in before if one.role == feedback_pb2.ROLE_ASSISTANT]
    return system, list(zip(asked, answers, strict=True)), last.content
