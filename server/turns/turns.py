"""Turns: a message and its one or two answers. One turn at a time per conversation, and per request_id.

`start_chat` documents what is on disk when; a comparison guarantees the same for both of its answers.

Several servers may share the store. An answer that one of them is writing keeps the others from its conversation: its
row is the lock, which the server's heartbeat renews, and which ends with the answer or when others find the server gone
(`Responses.fail_interrupted`). A turn that another server came before is started again.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TypeVar

from server.engine.base import Sampling, ServingEngine
from server.settings import ServerSettings
from server.shared.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from server.shared.model.prompt import build_prompt, to_messages, whole_prompt
from server.store.chats.histories import OwnHistory
from server.store.chats.records import Generation, Place
from server.store.quotas import check_conversations
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.turns.answers import Answers, Begun
from server.turns.before import Before, check_still, look_back
from server.turns.candidate_choice import CandidateChooser
from server.turns.comparison import SLOTS, arrange, repeat_answers, stream_answers
from server.turns.deletion import ELSEWHERE_SECONDS, delete_conversation
from server.turns.encoding_thread import CHARS_A_TOKEN, encoding
from server.turns.keyed_locks import KeyedLocks
from server.turns.messages import ChatTurn, ComparisonTurn, NewMessage, Write
from server.versions.ab_test import AbTest

# Takes places in the queue for a number of a user's answers while the block runs. Raises ResourceExhaustedError.
Room = Callable[[str, int], AbstractContextManager[None]]

T = TypeVar("T")


class Turns:
    """Starts turns, and deletes conversations between them."""

    def __init__(
        self,
        store: StoreThread,
        engine: ServingEngine,
        settings: ServerSettings,
        replica_id: str,
        room: Room,
        chooser: CandidateChooser | None = None,
        ab_test: AbTest | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._settings = settings
        self._replica_id = replica_id
        self._room = room
        self._chooser = chooser
        self._ab_test = ab_test
        self._locks = KeyedLocks()
        self._answers = Answers(store, engine)

    @property
    def live_versions(self) -> list[str]:
        """The versions that a message may name, the loaded one first."""
        return self._engine.live_versions

    @asynccontextmanager
    async def start_chat(self, message: NewMessage) -> AsyncIterator[ChatTurn]:
        """Start a turn with one answer.

        What is on disk, even if the process is killed:
        - when the block begins: the message, the ids, and that an answer is being sampled;
        - when `stream` returns: the answer's tokens with their log-probabilities and the versions that sampled them;
        - after an error or a cancellation in the block: the tokens so far, as failed or cancelled.
        An answer interrupted by a kill is marked as failed by the next server that starts.

        If the request_id was answered before, this is the stored turn, and `stream` repeats its answer.
        Raises NotFoundError, InvalidArgumentError and ResourceExhaustedError."""
        async with self._alone("Chat", message), AsyncExitStack() as turn:
            yield await _started(lambda: self._chat(message, turn))

    async def _chat(self, message: NewMessage, turn: AsyncExitStack) -> ChatTurn:
        before = await self._look_back("Chat", message)
        if before.first_result:
            return await self._repeated_chat(message.user, before.first_result)
        prompt, sampling = await self._prompt(message, before)
        version = message.policy_version or self._engine.version
        if version not in self._engine.live_versions:
            raise NotFoundError("live version", version)

        def begin(store: Store) -> Begun:
            with store.transaction():
                check_still(store, "Chat", message, before)
                conversation_id, place = self._open_conversation(store, message, before)
                response_id = store.responses.begin(
                    message.user,
                    conversation_id,
                    message=message.text,
                    replica_id=self._replica_id,
                    policy_version=version,
                    prompt_token_ids=prompt,
                    temperature=sampling.temperature,
                    max_tokens=sampling.max_tokens,
                    seed=sampling.seed,
                    stop=sampling.stop,
                    place=place,
                )
                _remember(store, "Chat", message, response_id)
            return Begun(conversation_id, [response_id])

        begun = await turn.enter_async_context(self._begun(message, begin, answers=1))
        [response_id] = begun.response_ids
        pinned = message.policy_version or None
        stream = partial(self._answers.of(message.user).sample, response_id, prompt, sampling, version=pinned)
        return ChatTurn(begun.conversation_id, response_id, version, prompt, stream)

    @asynccontextmanager
    async def start_comparison(self, message: NewMessage) -> AsyncIterator[ComparisonTurn]:
        """Start a turn with two answers, side by side. What is on disk when is as in `start_chat`."""
        async with self._alone("Compare", message), AsyncExitStack() as turn:
            yield await _started(lambda: self._comparison(message, turn))

    async def _comparison(self, message: NewMessage, turn: AsyncExitStack) -> ComparisonTurn:
        before = await self._look_back("Compare", message)
        if before.first_result:
            return await self._repeated_comparison(message.user, before.first_result)
        prompt, sampling = await self._prompt(message, before)
        pair = self._ab_test.pair if self._ab_test else None
        versions, samplings = arrange(pair, self._engine.version, sampling, self._settings.compare_temperatures)

        def begin(store: Store) -> Begun:
            with store.transaction():
                check_still(store, "Compare", message, before)
                conversation_id, place = self._open_conversation(store, message, before)
                comparison_id, a, b = store.responses.begin_comparison(
                    message.user,
                    conversation_id,
                    message=message.text,
                    replica_id=self._replica_id,
                    policy_versions=versions,
                    prompt_token_ids=prompt,
                    temperatures=(samplings[0].temperature, samplings[1].temperature),
                    max_tokens=sampling.max_tokens,
                    seeds=(samplings[0].seed, samplings[1].seed),
                    stop=sampling.stop,
                    place=place,
                )
                _remember(store, "Compare", message, comparison_id)
            return Begun(conversation_id, [a, b], comparison_id)

        chooser = self._chooser if not pair and sampling.seed is None else None
        sampled = self._settings.compare_candidates if chooser else 2
        begun = await turn.enter_async_context(self._begun(message, begin, answers=sampled))
        # Without a pair, a swap may come first: the answer uses what is loaded then, and its spans say what.
        pinned = versions if pair else (None, None)
        answers = list(zip(SLOTS, begun.response_ids, samplings, pinned, strict=True))
        stream = partial(stream_answers, self._answers.of(message.user), chooser, sampled, prompt, answers)
        return ComparisonTurn(begun.conversation_id, begun.comparison_id, prompt, stream)

    async def delete_conversation(self, user: str, conversation_id: str) -> None:
        """Delete a conversation once its current turn has ended, here or at another server. Raises NotFoundError."""
        async with self._locks.hold(_turn_key(user, conversation_id)):
            await delete_conversation(self._store, self._replica_id, user, conversation_id)

    @property
    def writing(self) -> frozenset[str]:
        """The ids of the answers that are being written here."""
        return self._answers.writing

    async def drain(self) -> None:
        """Return once every answer that was begun is on disk."""
        await self._answers.drain()

    @asynccontextmanager
    async def _alone(self, rpc: str, message: NewMessage) -> AsyncIterator[None]:
        """Run the block while no other call answers this request_id or in this conversation."""
        repeat = json.dumps([rpc, message.user, message.request_id]) if message.request_id else ""
        async with self._locks.hold(repeat), self._locks.hold(_turn_key(message.user, message.conversation_id)):
            yield

    async def _look_back(self, rpc: str, message: NewMessage) -> Before:
        new = Before(system=self._system(message))
        # Most calls have neither, and skip the store's thread.
        if not message.request_id and not message.conversation_id:
            return new
        chars = CHARS_A_TOKEN * self._engine.max_model_len
        read = partial(look_back, rpc, message, self._replica_id, new, self._settings.max_turns, chars)
        while (before := await self._store.read(read)).elsewhere:
            await asyncio.sleep(ELSEWHERE_SECONDS)
        return before

    def _system(self, message: NewMessage) -> str:
        """The system prompt of a conversation that begins with the message."""
        return self._settings.system_prompt if message.system is None else message.system

    async def _prompt(self, message: NewMessage, before: Before) -> tuple[list[int], Sampling]:
        limit = self._engine.max_model_len
        temperature, max_tokens = message.temperature, message.max_tokens
        sampling = Sampling(
            temperature=self._settings.service_temperature if temperature is None else temperature,
            max_tokens=min(self._settings.max_tokens, limit // 2) if max_tokens is None else max_tokens,
            seed=message.seed,
            stop=message.stop,
        )
        if sampling.max_tokens >= limit:
            raise InvalidArgumentError(
                "sampling.max_tokens",
                f"sampling.max_tokens must be below {limit}, the model's limit for a message and its answer together.",
            )
        began = time.time() if before.conversation_began is None else before.conversation_began
        encode = partial(self._engine.encode, began=began)
        room = limit - sampling.max_tokens
        if message.said is not None:
            messages = to_messages(message.said, message.text, before.system)
            return await encoding(whole_prompt, encode, messages, room, CHARS_A_TOKEN * room), sampling
        prompt = await encoding(build_prompt, encode, before.history, message.text, room, before.system)
        return prompt, sampling

    def _open_conversation(self, store: Store, message: NewMessage, before: Before) -> tuple[str, Place | None]:
        """The id of the message's conversation, and its place there; None at the beginning."""

        def create() -> str:
            check_conversations(store, message.user, self._settings.user_conversations)
            first = next((asked for asked, _ in message.said or () if asked), message.text)
            return store.conversations.create(message.user, first, system=before.system)

        if message.said is not None:
            if len(message.said) >= self._settings.max_turns:
                sentence = f"A conversation has at most {self._settings.max_turns} messages; leave out the oldest ones."
                raise ResourceExhaustedError("CONVERSATION_FULL", sentence)
            own = OwnHistory(before.system, message.said, message.text)
            return store.histories.place(message.user, own, self._settings.max_turns, create)
        if not message.conversation_id:
            return create(), None
        store.conversations.get(message.user, message.conversation_id)
        store.responses.skip_open_comparisons(message.conversation_id)
        # Calls with their own history may have come between, and are not what the model reads.
        return message.conversation_id, Place(before.parent)

    @asynccontextmanager
    async def _begun(self, message: NewMessage, begin: Callable[[Store], Begun], answers: int) -> AsyncIterator[Begun]:
        """A turn in progress. It takes places in the queue from now on, not while it waited for the previous turn."""
        with self._room(message.user, answers):
            async with self._answers.of(message.user).begun(begin) as begun:
                # A new conversation is locked like an existing one, before its id is sent. Calls with their own history
                # do not depend on one another.
                new = not message.conversation_id and message.said is None
                key = _turn_key(message.user, begun.conversation_id) if new else ""
                async with self._locks.hold(key):
                    yield begun

    async def _repeated_chat(self, user: str, response_id: str) -> ChatTurn:
        response = await self._store(lambda store: store.responses.get(user, response_id), user)

        async def stream(write: Write) -> Generation:
            await write(response.text)
            return response.generation

        prompt = response.prompt_token_ids
        return ChatTurn(response.conversation_id, response.id, response.policy_version, prompt, stream)

    async def _repeated_comparison(self, user: str, comparison_id: str) -> ComparisonTurn:
        found = await self._store(lambda store: store.responses.comparison(user, comparison_id), user)
        stream = partial(repeat_answers, found)
        return ComparisonTurn(found.conversation_id, found.id, found.a.prompt_token_ids, stream)


async def _started(start: Callable[[], Awaitable[T]]) -> T:
    """Start a turn; start it again if another server came first."""
    while True:
        try:
            return await start()
        except ConflictError:
            continue


def _remember(store: Store, rpc: str, message: NewMessage, result: str) -> None:
    store.requests.remember(message.user, rpc, message.request_id, message.body_sha256, result.encode(), result)


def _turn_key(user: str, conversation_id: str) -> str:
    """The lock's key, with the user: a caller who does not own the conversation must not wait as if it existed."""
    return json.dumps([user, conversation_id]) if conversation_id else ""
