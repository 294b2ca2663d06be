"""ChatService: one turn at a time per conversation; every answer on disk before its `finished`.

Handlers write to their context instead of yielding, so that a cancelled call is cancelled right here: sampling stops,
and what there is of the answers that were streamed is stored with their spans (`server.turns.answers`).
"""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from google.protobuf.message import Message
from prefloop.v1 import chat_pb2, chat_pb2_grpc

from server.admin.retention_task import RetentionTask
from server.engine.base import Sampling, ServingEngine
from server.identity import current_user
from server.rpc import to_proto
from server.rpc.limits import Limits
from server.rpc.paging import CHUNK, fill
from server.rpc.validation import MAX_PAGE_SIZE
from server.settings import ServerSettings
from server.shared.errors import InvalidArgumentError, ResourceExhaustedError
from server.store.feedback_store import FeedbackStore
from server.store.quotas import check_conversations
from server.store.records import Generation, Response, Slot
from server.store.store_thread import StoreThread
from server.turns.answers import Answers, Begun
from server.turns.candidate_choice import CandidateChooser
from server.turns.encoding_thread import CHARS_A_TOKEN, encoding
from server.turns.keyed_locks import KeyedLocks
from server.turns.prompt import Said, build_prompt
from server.versions.ab_test import AbTest

SLOTS: tuple[Slot, Slot] = ("A", "B")

Write = Callable[[Any], Awaitable[None]]


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """Chats, comparisons and the history of both."""

    def __init__(
        self,
        store: StoreThread,
        engine: ServingEngine,
        settings: ServerSettings,
        replica_id: str,
        retention: RetentionTask,
        limits: Limits,
        chooser: CandidateChooser | None = None,
        ab_test: AbTest | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._settings = settings
        self._replica_id = replica_id
        self._retention = retention
        self._limits = limits
        self._chooser = chooser
        self._ab_test = ab_test
        self._locks = KeyedLocks()
        self._answers = Answers(store, engine)

    async def Chat(self, request: chat_pb2.ChatRequest, context: Any) -> None:  # type: ignore[override]
        user = current_user()
        async with (
            self._locks.hold(_repeat_key("Chat", user, request)),
            self._locks.hold(_turn_key(user, request.conversation_id)),
        ):
            first, began, history = await self._before("Chat", user, request)
            if first:
                await self._replay_chat(user, first, context.write)
                return
            prompt, sampling = await self._prompt(history, began, request)
            version = self._engine.version

            def begin(store: FeedbackStore) -> Begun:
                with store.transaction():
                    conversation_id = self._open_conversation(store, user, request)
                    response_id = store.begin_response(
                        user,
                        conversation_id,
                        message=request.message,
                        replica_id=self._replica_id,
                        policy_version=version,
                        prompt_token_ids=prompt,
                        temperature=sampling.temperature,
                        max_tokens=sampling.max_tokens,
                        seed=sampling.seed,
                    )
                    _remember(store, "Chat", user, request, response_id)
                return Begun(conversation_id, [response_id])

            async def delta(text: str) -> None:
                await context.write(chat_pb2.ChatResponse(delta=chat_pb2.ChatDelta(text=text)))

            async with self._begun(user, request, begin, answers=1) as begun:
                [response_id] = begun.response_ids
                await context.write(_chat_started(begun.conversation_id, response_id, version))
                generation = await self._answers.sample(response_id, prompt, sampling, delta)
                last = generation.spans[-1].policy_version if generation.spans else version
                await context.write(_chat_finished(generation, prompt, last))

    async def Compare(self, request: chat_pb2.CompareRequest, context: Any) -> None:  # type: ignore[override]
        user = current_user()
        async with (
            self._locks.hold(_repeat_key("Compare", user, request)),
            self._locks.hold(_turn_key(user, request.conversation_id)),
        ):
            first, began, history = await self._before("Compare", user, request)
            if first:
                await self._replay_comparison(user, first, context.write)
                return
            prompt, sampling = await self._prompt(history, began, request)
            pair = self._ab_test.pair if self._ab_test else None
            versions, samplings = self._duel(pair, sampling) if pair else self._plain_comparison(sampling)

            def begin(store: FeedbackStore) -> Begun:
                with store.transaction():
                    conversation_id = self._open_conversation(store, user, request)
                    comparison_id, a, b = store.begin_comparison(
                        user,
                        conversation_id,
                        message=request.message,
                        replica_id=self._replica_id,
                        policy_versions=versions,
                        prompt_token_ids=prompt,
                        temperatures=(samplings[0].temperature, samplings[1].temperature),
                        max_tokens=sampling.max_tokens,
                        seeds=(samplings[0].seed, samplings[1].seed),
                    )
                    _remember(store, "Compare", user, request, comparison_id)
                return Begun(conversation_id, [a, b], comparison_id)

            writing = asyncio.Lock()  # gRPC takes one write at a time

            async def write(message: chat_pb2.CompareResponse) -> None:
                async with writing:
                    await context.write(message)

            chooser = self._chooser if not pair and sampling.seed is None else None
            sampled = self._settings.compare_candidates if chooser else 2
            async with self._begun(user, request, begin, answers=sampled) as begun:
                await write(_compare_started(begun.conversation_id, begun.comparison_id))
                # Elsewhere a swap may come first: such an answer takes whatever is loaded, and its spans say what.
                pinned = versions if pair else (None, None)
                answers = list(zip(SLOTS, begun.response_ids, samplings, pinned, strict=True))
                try:
                    if chooser:
                        await self._chosen_answers(chooser, answers, prompt, write)
                    else:
                        async with asyncio.TaskGroup() as both:
                            for answer in answers:
                                both.create_task(self._candidate(*answer, prompt, write))
                except ExceptionGroup as group:
                    raise group.exceptions[0] from group

    async def GetConversation(
        self, request: chat_pb2.GetConversationRequest, context: Any
    ) -> chat_pb2.GetConversationResponse:
        user, conversation_id = current_user(), request.conversation_id
        size = request.page_size or MAX_PAGE_SIZE
        key = to_proto.page_key(request.page_token, (int,))

        def entries(store: FeedbackStore) -> Iterator[tuple[list[Any], chat_pb2.Turn]]:
            after = key[0] if key else 0
            while turns := store.turns(user, conversation_id, CHUNK, after):
                votes = store.feedback_on(user, turns)
                for turn in turns:
                    yield [turn.seq], to_proto.turn(turn, votes)
                after = turns[-1].seq

        def read(store: FeedbackStore) -> chat_pb2.GetConversationResponse:
            conversation = to_proto.conversation(store.conversation(user, conversation_id))
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
        found = await self._store.read(lambda store: store.conversations(user, size + 1, before))
        page = found[:size]
        more = to_proto.page_token([page[-1].update_time, page[-1].id]) if len(found) > size else ""
        return chat_pb2.ListConversationsResponse(
            conversations=[to_proto.conversation(record) for record in page], next_page_token=more
        )

    async def DeleteConversation(
        self, request: chat_pb2.DeleteConversationRequest, context: Any
    ) -> chat_pb2.DeleteConversationResponse:
        user = current_user()
        async with self._locks.hold(_turn_key(user, request.conversation_id)):
            await self._store(lambda store: store.delete_conversation(user, request.conversation_id))
        await self._retention.erase()
        return chat_pb2.DeleteConversationResponse()

    async def drain(self) -> None:
        """Returns once every answer that was begun is on disk."""
        await self._answers.drain()

    # Sampling

    async def _prompt(
        self, history: list[Said], began: float, request: chat_pb2.ChatRequest | chat_pb2.CompareRequest
    ) -> tuple[list[int], Sampling]:
        given = {field.name: value for field, value in request.sampling.ListFields()}
        limit = self._engine.max_model_len
        sampling = Sampling(
            temperature=given.get("temperature", self._settings.service_temperature),
            max_tokens=given.get("max_tokens", min(self._settings.max_tokens, limit // 2)),
            seed=given.get("seed"),
        )
        if sampling.max_tokens >= limit:
            raise InvalidArgumentError(
                "sampling.max_tokens",
                f"sampling.max_tokens must be below {limit}, which is what the model has for a message and its answer.",
            )
        encode = partial(self._engine.encode, began=began)
        prompt = await encoding(build_prompt, encode, history, request.message, limit - sampling.max_tokens)
        return prompt, sampling

    def _plain_comparison(self, base: Sampling) -> tuple[tuple[str, str], list[Sampling]]:
        """One version at two temperatures; which is A's is random."""
        low, high = random.sample(self._settings.compare_temperatures, 2)
        return (self._engine.version, self._engine.version), two_samplings(base, low, high)

    def _duel(self, pair: tuple[str, str], base: Sampling) -> tuple[tuple[str, str], list[Sampling]]:
        """Two versions at one temperature, so that nothing else differs; which is A's is random."""
        one, other = random.sample(pair, 2)
        return (one, other), two_samplings(base, base.temperature, base.temperature)

    async def _candidate(
        self, slot: Slot, response_id: str, sampling: Sampling, version: str | None, prompt: list[int], write: Write
    ) -> Generation:
        def delta(text: str) -> Awaitable[None]:
            return write(_compare_delta(slot, text))

        generation = await self._answers.sample(response_id, prompt, sampling, delta, version)
        await write(_compare_finished(slot, response_id, generation, prompt))
        return generation

    async def _chosen_answers(
        self,
        chooser: CandidateChooser,
        answers: list[tuple[Slot, str, Sampling, str | None]],
        prompt: list[int],
        write: Write,
    ) -> None:
        """One answer is streamed; the other comes whole, chosen when all have ended. Which of them is A is random."""
        streamed, (slot, response_id, sampling, _) = random.sample(answers, 2)
        async with asyncio.TaskGroup() as group:
            first = group.create_task(self._candidate(*streamed, prompt, write))
            unseen = [
                group.create_task(self._answers.sample_unseen(prompt, sampling))
                for _ in range(self._settings.compare_candidates - 1)
            ]
        candidates = [task.result() for task in unseen]
        chosen = await chooser.choose(prompt, first.result().token_ids, [one.token_ids for one in candidates])
        generation = candidates[chosen.index]
        await self._answers.keep(response_id, generation, chosen.reward_model_version)
        await _write_whole(write, slot, response_id, generation, prompt)

    @asynccontextmanager
    async def _begun(
        self, user: str, request: Any, begin: Callable[[FeedbackStore], Begun], answers: int
    ) -> AsyncIterator[Begun]:
        """A turn under way. It takes room in the queue from now on, not while it waited for the turn before it."""
        with self._limits.answering(user, answers):
            async with self._answers.begun(begin) as begun:
                # A conversation that begins is held like one that was there, before its id is told.
                key = "" if request.conversation_id else _turn_key(user, begun.conversation_id)
                async with self._locks.hold(key):
                    yield begun

    def _open_conversation(
        self, store: FeedbackStore, user: str, request: chat_pb2.ChatRequest | chat_pb2.CompareRequest
    ) -> str:
        if not request.conversation_id:
            check_conversations(store, user, self._settings.user_conversations)
            return store.create_conversation(user, request.message)
        store.conversation(user, request.conversation_id)
        store.skip_open_comparisons(request.conversation_id)
        return request.conversation_id

    # What went before

    async def _before(
        self, rpc: str, user: str, request: chat_pb2.ChatRequest | chat_pb2.CompareRequest
    ) -> tuple[str | None, float, list[Said]]:
        """What the same request_id was answered first, if it was; else when the conversation began, and as much of it
        as the model could read."""
        chars = CHARS_A_TOKEN * self._engine.max_model_len

        def read(store: FeedbackStore) -> tuple[str | None, float, list[Said]]:
            if request.request_id:
                first = store.find_request(user, rpc, request.request_id, _sha256(request))
                if first is not None:
                    return first.decode(), 0.0, []
            if not request.conversation_id:
                return None, time.time(), []
            conversation = store.conversation(user, request.conversation_id)
            if store.count_turns(conversation.id) >= self._settings.max_turns:
                raise ResourceExhaustedError("CONVERSATION_FULL", "This conversation is full; start another one.")
            return None, conversation.create_time, newest(store, user, conversation.id, chars)

        if not request.request_id and not request.conversation_id:
            return None, time.time(), []
        return await self._store.read(read)

    async def _replay_chat(self, user: str, response_id: str, write: Write) -> None:
        response = await self._store(lambda store: store.response(user, response_id))
        await write(_chat_started(response.conversation_id, response.id, response.policy_version))
        await write(chat_pb2.ChatResponse(delta=chat_pb2.ChatDelta(text=response.text)))
        await write(_chat_finished(_generation(response), response.prompt_token_ids, response.last_version))

    async def _replay_comparison(self, user: str, comparison_id: str, write: Write) -> None:
        comparison = await self._store(lambda store: store.comparison(user, comparison_id))
        await write(_compare_started(comparison.conversation_id, comparison.id))
        slots: list[tuple[Slot, Response]] = [("A", comparison.a), ("B", comparison.b)]
        for slot, response in slots:
            await _write_whole(write, slot, response.id, _generation(response), response.prompt_token_ids)


def newest(store: FeedbackStore, user: str, conversation_id: str, chars: int) -> list[Said]:
    """The end of a conversation, of about so many characters at most, in order; without turns that the model must not
    see."""
    found: list[Said] = []
    before: int | None = None
    while chars > 0 and (turns := store.newest_turns(user, conversation_id, CHUNK, before)):
        said = [(turn.message, turn.answer) for turn in turns if turn.answer is not None]
        found += said
        chars -= sum(len(message) + len(answer) for message, answer in said)
        before = turns[-1].seq
    return found[::-1]


def two_samplings(base: Sampling, *temperatures: float) -> list[Sampling]:
    """Of A and B; two seeds, so that equal temperatures differ all the same."""
    seeds = [None, None] if base.seed is None else [base.seed, (base.seed + 1) % 2**63]
    return [Sampling(temperature, base.max_tokens, seed) for temperature, seed in zip(temperatures, seeds, strict=True)]


def _remember(store: FeedbackStore, rpc: str, user: str, request: Any, result: str) -> None:
    if request.request_id:
        store.remember_request(user, rpc, request.request_id, _sha256(request), result.encode(), result)


def _repeat_key(rpc: str, user: str, request: Any) -> str:
    return json.dumps([rpc, user, request.request_id]) if request.request_id else ""


def _turn_key(user: str, conversation_id: str) -> str:
    """With the user: who does not own the conversation must not wait as if it were there."""
    return json.dumps([user, conversation_id]) if conversation_id else ""


def _sha256(request: Message) -> bytes:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def _generation(response: Response) -> Generation:
    reason: Any = response.finish_reason or "error"
    return Generation(response.token_ids, response.logprobs, response.text, reason, response.spans)


def _chat_started(conversation_id: str, response_id: str, version: str) -> chat_pb2.ChatResponse:
    started = chat_pb2.ChatStarted(conversation_id=conversation_id, response_id=response_id, policy_version=version)
    return chat_pb2.ChatResponse(started=started)


def _chat_finished(generation: Generation, prompt: list[int], version: str) -> chat_pb2.ChatResponse:
    finished = chat_pb2.ChatFinished(
        text=generation.text,
        finish_reason=to_proto.FINISH_REASONS[generation.finish_reason],
        usage=to_proto.usage(prompt, generation.token_ids),
        policy_version=version,
    )
    return chat_pb2.ChatResponse(finished=finished)


def _compare_started(conversation_id: str, comparison_id: str) -> chat_pb2.CompareResponse:
    started = chat_pb2.CompareStarted(conversation_id=conversation_id, comparison_id=comparison_id)
    return chat_pb2.CompareResponse(started=started)


async def _write_whole(write: Write, slot: Slot, response_id: str, generation: Generation, prompt: list[int]) -> None:
    await write(_compare_delta(slot, generation.text))
    await write(_compare_finished(slot, response_id, generation, prompt))


def _compare_delta(slot: Slot, text: str) -> chat_pb2.CompareResponse:
    return chat_pb2.CompareResponse(delta=chat_pb2.CompareDelta(slot=to_proto.SLOTS[slot], text=text))


def _compare_finished(
    slot: Slot, response_id: str, generation: Generation, prompt: list[int]
) -> chat_pb2.CompareResponse:
    finished = chat_pb2.CompareFinished(
        slot=to_proto.SLOTS[slot],
        text=generation.text,
        finish_reason=to_proto.FINISH_REASONS[generation.finish_reason],
        usage=to_proto.usage(prompt, generation.token_ids),
        response_id=response_id,
    )
    return chat_pb2.CompareResponse(finished=finished)
