"""ChatService: turns of conversations as messages. `server.turns.turns` documents what is on disk when.

Handlers write to their context instead of yielding, so that a cancelled call is cancelled right here: sampling stops,
and the text so far is stored.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2

from server.admin.retention_task import RetentionTask
from server.rpc import to_proto
from server.rpc.idempotency import body_sha256
from server.rpc.identity import current_user
from server.rpc.paging import CHUNK, fill
from server.rpc.validation import MAX_PAGE_SIZE
from server.store.chats.records import Generation, Slot
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.turns.messages import ChatTurn, NewMessage
from server.turns.turns import Turns


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """Chats, comparisons and the history of both."""

    def __init__(self, store: StoreThread, turns: Turns, retention: RetentionTask) -> None:
        self._store = store
        self._turns = turns
        self._retention = retention

    async def Chat(self, request: chat_pb2.ChatRequest, context: Any) -> None:  # type: ignore[override]
        async def delta(text: str) -> None:
            await context.write(chat_pb2.ChatResponse(delta=chat_pb2.ChatDelta(text=text)))

        async with self._turns.start_chat(_message(request)) as turn:
            started = chat_pb2.ChatStarted(
                conversation_id=turn.conversation_id, response_id=turn.response_id, policy_version=turn.policy_version
            )
            await context.write(chat_pb2.ChatResponse(started=started))
            generation = await turn.stream(delta)
            await context.write(chat_pb2.ChatResponse(finished=_chat_finished(turn, generation)))

    async def Compare(self, request: chat_pb2.CompareRequest, context: Any) -> None:  # type: ignore[override]
        writing = asyncio.Lock()  # gRPC accepts one write at a time

        async def write(message: chat_pb2.CompareResponse) -> None:
            async with writing:
                await context.write(message)

        async def delta(slot: Slot, text: str) -> None:
            await write(chat_pb2.CompareResponse(delta=chat_pb2.CompareDelta(slot=to_proto.SLOTS[slot], text=text)))

        async with self._turns.start_comparison(_message(request)) as turn:

            async def ended(slot: Slot, response_id: str, generation: Generation) -> None:
                finished = chat_pb2.CompareFinished(
                    slot=to_proto.SLOTS[slot],
                    text=generation.text,
                    finish_reason=to_proto.FINISH_REASONS[generation.finish_reason],
                    usage=to_proto.usage(turn.prompt_token_ids, generation.token_ids),
                    response_id=response_id,
                )
                await write(chat_pb2.CompareResponse(finished=finished))

            started = chat_pb2.CompareStarted(conversation_id=turn.conversation_id, comparison_id=turn.comparison_id)
            await write(chat_pb2.CompareResponse(started=started))
            await turn.stream(delta, ended)

    async def FindResponse(self, request: chat_pb2.FindResponseRequest, context: Any) -> chat_pb2.FindResponseResponse:
        *said, answer = request.messages
        system = request.system if request.HasField("system") else None
        message = with_own_history(NewMessage(current_user(), "", system=system), said)
        return chat_pb2.FindResponseResponse(response_id=await self._turns.find_response(message, answer.content))

    async def ListVersions(self, request: chat_pb2.ListVersionsRequest, context: Any) -> chat_pb2.ListVersionsResponse:
        live = self._turns.live_versions
        found = await self._store.read(lambda store: [store.policies.get(version) for version in live])
        versions = [
            chat_pb2.LiveVersion(policy_version=one.version, create_time=to_proto.timestamp(one.create_time))
            for one in found
        ]
        return chat_pb2.ListVersionsResponse(versions=versions)

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
        await self._turns.delete_conversation(current_user(), request.conversation_id)
        await self._retention.erase()
        return chat_pb2.DeleteConversationResponse()


def _message(request: chat_pb2.ChatRequest | chat_pb2.CompareRequest) -> NewMessage:
    given = {field.name: value for field, value in request.sampling.ListFields()}
    message = NewMessage(
        user=current_user(),
        text=request.message,
        conversation_id=request.conversation_id,
        request_id=request.request_id,
        body_sha256=body_sha256(request),
        system=request.system if request.HasField("system") else None,
        policy_version=request.policy_version if isinstance(request, chat_pb2.ChatRequest) else "",
        **{**given, "stop": tuple(request.sampling.stop)},
    )
    return with_own_history(message, request.messages) if request.messages else message


def with_own_history(message: NewMessage, messages: Sequence[feedback_pb2.Message]) -> NewMessage:
    """The message with a caller's valid `messages` as its history, text and system prompt."""
    *before, last = messages
    system = message.system
    if before and before[0].role == feedback_pb2.ROLE_SYSTEM:
        system = before.pop(0).content
    # An answer that comes first has no message.
    asked = [""] if before and before[0].role == feedback_pb2.ROLE_ASSISTANT else []
    asked += [one.content for one in before if one.role == feedback_pb2.ROLE_USER]
    answers = [one.content for one in before if one.role == feedback_pb2.ROLE_ASSISTANT]
    return replace(message, text=last.content, system=system, said=list(zip(asked, answers, strict=True)))


def _chat_finished(turn: ChatTurn, generation: Generation) -> chat_pb2.ChatFinished:
    return chat_pb2.ChatFinished(
        text=generation.text,
        finish_reason=to_proto.FINISH_REASONS[generation.finish_reason],
        usage=to_proto.usage(turn.prompt_token_ids, generation.token_ids),
        policy_version=generation.spans[-1].policy_version if generation.spans else turn.policy_version,
        spans=to_proto.spans(generation.spans),
    )
