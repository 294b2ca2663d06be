"""ChatService: turns of conversations as messages. `server.turns.turns` documents what is on disk when.

Handlers write to their context instead of yielding, so that a cancelled call is cancelled right here: sampling stops,
and the text so far is stored.
"""

import asyncio
from dataclasses import replace
from typing import Any

from prefloop.v1 import chat_pb2

from server.admin.retention_task import RetentionTask
from server.rpc import to_proto
from server.rpc.idempotency import body_sha256
from server.rpc.identity import current_user
from server.rpc.services.conversations import ConversationService, own_history
from server.store.chats.records import Generation, Slot
from server.store.store_thread import StoreThread
from server.turns.messages import ChatTurn, NewMessage
from server.turns.turns import Turns


class ChatService(ConversationService):
    """Chats, comparisons and the history of both."""

    def __init__(self, store: StoreThread, system_prompt: str, turns: Turns, retention: RetentionTask) -> None:
        super().__init__(store, system_prompt, turns.delete_conversation, retention)
        self._turns = turns

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

    async def ListVersions(self, request: chat_pb2.ListVersionsRequest, context: Any) -> chat_pb2.ListVersionsResponse:
        live = self._turns.live_versions
        found = await self._store.read(lambda store: [store.policies.get(version) for version in live])
        versions = [
            chat_pb2.LiveVersion(policy_version=one.version, create_time=to_proto.timestamp(one.create_time))
            for one in found
        ]
        return chat_pb2.ListVersionsResponse(versions=versions)


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
    if not request.messages:
        return message
    system, said, text = own_history(message.system, request.messages)
    return replace(message, system=system, said=said, text=text)


def _chat_finished(turn: ChatTurn, generation: Generation) -> chat_pb2.ChatFinished:
    return chat_pb2.ChatFinished(
        text=generation.text,
        finish_reason=to_proto.FINISH_REASONS[generation.finish_reason],
        usage=to_proto.usage(turn.prompt_token_ids, generation.token_ids),
        policy_version=generation.spans[-1].policy_version if generation.spans else turn.policy_version,
        spans=to_proto.spans(generation.spans),
    )
