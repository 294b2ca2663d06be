"""Turns that are being answered. Each runs to its end independently of its readers, of which there may be any number.

A reload, a second tab or a lost connection therefore does no harm. When the stream ends for any reason, the turn is
replaced by the one that the server has stored.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

from prefloop.v1.chat_pb2 import (
    SLOT_A,
    ChatDelta,
    ChatStarted,
    CompareDelta,
    CompareStarted,
    Response,
    Slot,
    Turn,
)

from clients.async_client import AsyncClient
from clients.calls import AsyncStream, ChatEvent, CompareEvent
from clients.errors import PrefloopError, UnavailableError
from clients.web.rendering import turn_id
from clients.web.sign_in import SignedIn

AnswerStream = AsyncStream[ChatEvent] | AsyncStream[CompareEvent]

# The shortest time between updates. Each update renders the turn once for all its readers.
PAUSE_SECONDS = 0.1
# How long the server may be unavailable in the middle of an answer.
AWAY_SECONDS = 600.0
KEPT_NOTICES = 1000
AWAY = "The server went away in the middle of this answer. The page continues as soon as the server is back."
CAME_BACK = "The server went away in the middle of this answer. This is the part that it stored."


class TurnUnderWay:
    """One message and its answer or answers so far."""

    def __init__(self, message: str) -> None:
        self.turn = Turn(message=message)
        self.conversation_id = ""
        # A sentence for the reader in addition to the text.
        self.notice = ""
        self.over = False
        self._changed = asyncio.Event()
        self._announcing: asyncio.TimerHandle | None = None
        self._drawn: str | None = None
        self._started = asyncio.get_running_loop().create_future()

    async def started(self) -> None:
        """Returns once the turn is on the server's disk. Raises a PrefloopError if it never gets there."""
        await asyncio.shield(self._started)

    def stop(self) -> None:
        """Stops the answer; the part so far is stored."""
        self._stream.cancel()

    async def changes(self) -> AsyncIterator[None]:
        """Yields at once, then after every change, and for the last time when the turn is over."""
        while True:
            changed, over = self._changed, self.over
            yield
            if over:
                return
            await changed.wait()

    def drawn(self, draw: Callable[[Turn, str], str]) -> str:
        """The result of `draw` for the current turn and notice, cached until they change."""
        if self._drawn is None:
            self._drawn = draw(self.turn, self.notice)
        return self._drawn

    async def run(self, client: AsyncClient, stream: AnswerStream) -> None:
        """Follows the stream to its end, then fetches the stored turn."""
        self._stream = stream
        try:
            broken = await self._follow(stream)
            self.turn = await client.refetch(stream, timeout=AWAY_SECONDS)
            self.notice = CAME_BACK if isinstance(broken, UnavailableError) else str(broken or "")
        except PrefloopError as error:
            self.notice = str(error)
            if not self._started.done():
                self._started.set_exception(error)
        finally:
            # After any other error too, so that nobody waits for ever.
            self._started.cancel()
            self.over = True
            self._tell()

    async def _follow(self, stream: AnswerStream) -> PrefloopError | None:
        """The error that broke the stream, or None. Raises it if the answer had not started."""
        try:
            async for event in stream:
                self._take(event)
                self._tell()
        except PrefloopError as error:
            if not self._started.done():
                raise
            self.notice = AWAY if isinstance(error, UnavailableError) else str(error)
            self._tell()
            return error
        return None

    def _take(self, event: ChatEvent | CompareEvent) -> None:
        # Finished events are ignored, since the stored turn has everything they say.
        match event:
            case ChatStarted():
                self.turn.response.response_id = event.response_id
                self._begin(event.conversation_id)
            case CompareStarted():
                self.turn.comparison.comparison_id = event.comparison_id
                self._begin(event.conversation_id)
            case ChatDelta():
                self.turn.response.text += event.text
            case CompareDelta():
                self._answer(event.slot).text += event.text

    def _begin(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        self._started.set_result(None)

    def _answer(self, slot: Slot.ValueType) -> Response:
        return self.turn.comparison.a if slot == SLOT_A else self.turn.comparison.b

    def _tell(self) -> None:
        self._drawn = None
        if self.over:
            self._announce()
        elif not self._announcing:
            self._announcing = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._announce)

    def _announce(self) -> None:
        if self._announcing:
            self._announcing.cancel()
        self._announcing = None
        self._changed.set()
        self._changed = asyncio.Event()


class TurnsUnderWay:
    """The turns that are being answered, by user and conversation."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, str], TurnUnderWay] = {}
        # Errors of turns that are over, by turn id; the server does not store them.
        self._notices: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, person: SignedIn, message: str, stream: AnswerStream) -> TurnUnderWay:
        """Follows a new stream. Returns once the turn is on the server's disk; raises if it never gets there."""
        live = TurnUnderWay(message)
        task = asyncio.create_task(self._run(live, person, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await live.started()
        if not live.over:
            self._turns[person.name, live.conversation_id] = live
        return live

    def find(self, person: SignedIn, conversation_id: str) -> TurnUnderWay | None:
        """The turn that is being answered in a conversation, or None."""
        return self._turns.get((person.name, conversation_id))

    def notice(self, turn: Turn) -> str:
        """The error of a turn that was recently answered here; empty without one."""
        return self._notices.get(turn_id(turn), "")

    async def close(self) -> None:
        """Stops every answer; the server stores the parts so far."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, live: TurnUnderWay, person: SignedIn, stream: AnswerStream) -> None:
        try:
            await live.run(person.client, stream)
        finally:
            # The next turn may have replaced this one, since the server starts it while we fetch this one.
            if self.find(person, live.conversation_id) is live:
                del self._turns[person.name, live.conversation_id]
            if live.notice:
                self._notices[turn_id(live.turn)] = live.notice
                if len(self._notices) > KEPT_NOTICES:
                    del self._notices[next(iter(self._notices))]
