"""Answers in progress: each one that was begun in the store is also ended there, whatever happens to its caller.

An answer's end is stored by a separate task that is never cancelled; `drain` waits for all of them before the store is
closed.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from server.engine.base import AnswerStream, Sampling, ServingEngine
from server.shared.errors import DatabaseError
from server.store.chats.records import Generation
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.telemetry.observation import observed_answer
from server.telemetry.safe_traceback import safe_traceback

log = logging.getLogger(__name__)

# How often what an answer says so far is stored: what is left of it after a kill.
KEEP_SECONDS = 2.0

T = TypeVar("T")
Abandoned = Literal["cancelled", "error"]


@dataclass(frozen=True)
class Begun:
    """The ids of a turn whose answers are being sampled."""

    conversation_id: str
    response_ids: list[str]
    comparison_id: str = ""


class Answers:
    """Samples answers from the policy and stores them."""

    def __init__(self, store: StoreThread, engine: ServingEngine) -> None:
        self._store = store
        self._engine = engine
        self._settling: set[asyncio.Future[Any]] = set()
        self._user: str | None = None
        self._writing: set[str] = set()

    @property
    def writing(self) -> frozenset[str]:
        """The ids of answers that have begun and are not stored as ended yet."""
        return frozenset(self._writing)

    def of(self, user: str) -> "Answers":
        """The same, for the answers of one user."""
        theirs = copy(self)
        theirs._user = user
        return theirs

    @asynccontextmanager
    async def begun(self, begin: Callable[[Store], Begun]) -> AsyncIterator[Begun]:
        """Run `begin`, which stores a turn's responses as being sampled.

        If the block raises, responses that have no stored end are stored as failed, or as cancelled if the caller left.
        """
        beginning = asyncio.create_task(self._store(begin, self._user))
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settling.add(ended)
        beginning.add_done_callback(self._began)
        try:
            yield await asyncio.shield(beginning)
        except BaseException as error:
            reason: Abandoned = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
            self._settle(self._abandon(beginning, reason))
            raise
        else:
            self._writing.difference_update(beginning.result().response_ids)
        finally:
            self._settling.discard(ended)
            ended.set_result(None)

    def _began(self, beginning: asyncio.Task[Begun]) -> None:
        if not beginning.cancelled() and beginning.exception() is None:
            self._writing.update(beginning.result().response_ids)

    async def sample(
        self,
        response_id: str,
        prompt: list[int],
        sampling: Sampling,
        send: Callable[[str], Awaitable[None]],
        version: str | None = None,
    ) -> Generation:
        """Sample one answer, send its text piece by piece, and return once it is stored. Its beginning is stored every
        KEEP_SECONDS."""
        with observed_answer(len(prompt)) as seen:
            stream = await self._engine.sample(prompt, sampling, version)
            kept = time.monotonic()
            try:
                async for text in stream:
                    seen.text()
                    await send(text)
                    if time.monotonic() - kept > KEEP_SECONDS:
                        kept = time.monotonic()
                        self._settle(self._keep_so_far(response_id, stream.so_far()))
            finally:
                generation = await asyncio.shield(self._settle(self._finish(response_id, stream)))
                seen.end(generation)
        return generation

    async def sample_unseen(self, prompt: list[int], sampling: Sampling) -> Generation:
        """Sample one answer that is neither shown nor stored."""
        with observed_answer(len(prompt)) as seen:
            stream = await self._engine.sample(prompt, sampling)
            try:
                async for _ in stream:
                    seen.text()
            finally:
                generation = await asyncio.shield(self._settle(stream.finish()))
                seen.end(generation)
        return generation

    async def keep(self, response_id: str, generation: Generation, chosen_by: str | None) -> None:
        """Store an answer that was sampled unseen, and which reward model chose it, even if the caller is cancelled."""
        keeping = self._store(lambda store: store.responses.finish(response_id, generation, chosen_by), self._user)
        await asyncio.shield(self._settle(keeping))

    async def drain(self) -> None:
        """Return once every answer that was begun is on disk."""
        while self._settling:
            await asyncio.wait(self._settling)

    def _settle(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        settling = asyncio.create_task(work)
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        return settling

    async def _finish(self, response_id: str, stream: AnswerStream) -> Generation:
        try:
            generation = await stream.finish()
        except Exception as error:
            # The stream itself reports the engine's failure to the caller; here the answer so far must not be lost.
            log.error("an answer could not be finished; storing it as far as it got\n%s", safe_traceback(error))
            generation = stream.fail()
        await self._store(lambda store: store.responses.finish(response_id, generation), self._user)
        return generation

    async def _keep_so_far(self, response_id: str, so_far: Generation) -> None:
        try:
            await self._store(lambda store: store.responses.keep(response_id, so_far), self._user)
        except DatabaseError as error:
            log.warning("the beginning of an answer could not be stored: %s", error)

    async def _abandon(self, beginning: asyncio.Task[Begun], reason: Abandoned) -> None:
        await asyncio.wait([beginning])
        # If `begin` failed, there is nothing to end.
        if beginning.exception() is None:
            response_ids = beginning.result().response_ids
            try:
                await self._store(lambda store: store.responses.abandon(response_ids, reason), self._user)
            except DatabaseError as error:
                # Nobody renews them from here on, so that they are soon stored as interrupted.
                log.warning("the end of a failed turn could not be stored: %s", error)
            finally:
                self._writing.difference_update(response_ids)
