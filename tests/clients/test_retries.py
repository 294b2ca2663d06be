"""Which calls are retried, how often and when, against a real server that rejects the first attempts."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from prefloop.v1.chat_pb2 import ChatDelta, CompareFinished
from prefloop.v1.feedback_pb2 import CHOICE_B, ROLE_ASSISTANT, THUMB_UP, Message
from starlette.requests import Request

from clients import AsyncClient, BusyError, Client, PrefloopError, UnavailableError, retries
from clients.calls import AsyncStream, ChatEvent
from clients.retries import AsyncPauses, Backoff, Pauses
from clients.web.sign_in import Doorkeeper
from tests.clients.conftest import WAIT_SECONDS, FakeService, serving, status

AWAY = grpc.StatusCode.UNAVAILABLE


def stopping(seconds: float | None = None) -> Status:
    """The error of a server that is shutting down, optionally with a retry delay."""
    refusal = status(AWAY, "Stopping.")
    if seconds is not None:
        refusal.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))))
    return refusal


class Clock:
    """A clock that advances only in pauses."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float, over: Callable[[], bool] = lambda: False) -> None:
        self.pauses.append(round(seconds, 3))
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Pauses that take no time and are not shortened at random."""
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)

    async def wait(_: AsyncPauses, *arguments: Any) -> None:
        clock.wait(*arguments)

    monkeypatch.setattr(Pauses, "wait", lambda _, *arguments: clock.wait(*arguments))
    monkeypatch.setattr(AsyncPauses, "wait", wait)
    return clock


@pytest.fixture
async def async_client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address, user="ana", timeout=WAIT_SECONDS, stream_timeout=WAIT_SECONDS) as client:
        yield client


def test_a_vote_is_sent_again_with_its_id_until_the_server_is_back(
    client: Client, service: FakeService, clock: Clock
) -> None:
    service.fail["SubmitChoice"] = [stopping()] * 7
    assert client.choose("cmp", CHOICE_B).choice == CHOICE_B
    assert len(service.sent("SubmitChoice")) == 8
    assert len({request.request_id for request in service.sent("SubmitChoice")}) == 1
    assert clock.pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_every_kind_of_vote_and_every_question_is_sent_again(
    client: Client, service: FakeService, clock: Clock
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "SubmitThumb": lambda: client.thumb("resp", THUMB_UP),
        "SubmitCorrection": lambda: client.correct("resp", "Trees."),
        "SubmitDemonstration": lambda: client.demonstrate([Message(role=ROLE_ASSISTANT, content="Mice.")]),
        "GetConversation": lambda: client.conversation("conv"),
        "ListConversations": lambda: list(client.conversations()),
        "ListFeedback": lambda: list(client.feedback()),
        "GetActivePolicy": client.active_policy,
        "ListRounds": lambda: list(client.rounds()),
        "GetCaller": client.caller,
        "ExportUser": lambda: list(client.export_user()),
    }
    for rpc, call in calls.items():
        service.fail[rpc] = [stopping(), stopping()]
        assert call()
    # Two more than without failures: lists have two pages, the others one response.
    sent = {rpc: len(service.sent(rpc)) for rpc in calls}
    assert sent == dict.fromkeys(calls, 3) | {"ListConversations": 4, "ListFeedback": 4}


def test_a_call_that_a_stopping_server_cancels_is_sent_again(
    client: Client, service: FakeService, clock: Clock
) -> None:
    service.fail["SubmitThumb"] = [grpc.StatusCode.CANCELLED]
    client.thumb("resp", THUMB_UP)
    first, second = service.requests
    assert first == second


def test_what_would_be_done_twice_is_sent_once(client: Client, service: FakeService, clock: Clock) -> None:
    calls: dict[str, Callable[[], object]] = {
        "RetractFeedback": lambda: client.retract("fb"),
        "DeleteConversation": lambda: client.delete_conversation("conv"),
        "ForgetUser": client.forget_user,
        "ActivatePolicy": lambda: client.activate("v0002"),
        "RollbackPolicy": client.rollback,
        "RequestRound": client.request_round,
    }
    for rpc, call in calls.items():
        service.fail[rpc] = [stopping()]
        with pytest.raises(UnavailableError, match=r"^Stopping\.$"):
            call()
    assert {rpc: len(service.sent(rpc)) for rpc in calls} == dict.fromkeys(calls, 1)
    assert clock.pauses == []


def test_a_message_whose_answer_has_not_begun_is_sent_again_as_the_same_request(
    client: Client, service: FakeService, clock: Clock
) -> None:
    service.fail["Chat"] = [stopping()] * 3
    service.fail["Compare"] = [stopping()] * 2
    stream = client.chat("Where do owls live?")
    assert [event.text for event in stream if isinstance(event, ChatDelta)] == ["Owls ", "live in ", "trees."]
    assert (stream.conversation_id, stream.response_id) == ("conv", "resp")
    answers = [event.text for event in client.compare("Fish?") if isinstance(event, CompareFinished)]
    assert answers == ["You may try a net.", "A net helps."]
    assert (len(service.sent("Chat")), len(service.sent("Compare"))) == (4, 3)
    ids = [{request.request_id for request in service.sent(rpc)} for rpc in ("Chat", "Compare")]
    assert [len(found) for found in ids] == [1, 1]
    assert "" not in ids[0] | ids[1]


async def test_the_same_with_asyncio(async_client: AsyncClient, service: FakeService, clock: Clock) -> None:
    service.fail["Chat"] = [stopping()] * 3
    service.fail["SubmitThumb"] = [stopping()] * 2
    events = [event async for event in async_client.chat("hi")]
    assert [event.text for event in events if isinstance(event, ChatDelta)] == ["Owls ", "live in ", "trees."]
    assert (await async_client.thumb("resp", THUMB_UP)).thumb == THUMB_UP
    assert (len(service.sent("Chat")), len(service.sent("SubmitThumb"))) == (4, 3)
    assert len({request.request_id for request in service.sent("Chat")}) == 1
    assert clock.pauses == [0.2, 0.4, 0.8, 0.2, 0.4]


def test_an_answer_that_broke_half_way_is_not_asked_for_again(
    client: Client, service: FakeService, clock: Clock
) -> None:
    service.breaking = True
    for stream in (client.chat("hi"), client.compare("fish")):
        assert next(stream)
        with pytest.raises(UnavailableError, match=r"^The engine died\.$"):
            list(stream)
    assert (len(service.sent("Chat")), len(service.sent("Compare"))) == (1, 1)
    assert clock.pauses == []


async def test_a_half_heard_answer_is_not_asked_for_again_with_asyncio(
    async_client: AsyncClient, service: FakeService, clock: Clock
) -> None:
    service.breaking = True
    stream = async_client.chat("hi")
    assert await anext(stream)
    with pytest.raises(UnavailableError, match=r"^The engine died\.$"):
        [event async for event in stream]
    assert len(service.sent("Chat")) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, BusyError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, PrefloopError),
        (grpc.StatusCode.INTERNAL, PrefloopError),
    ],
)
def test_only_a_server_that_is_away_is_tried_again(
    client: Client, service: FakeService, clock: Clock, code: grpc.StatusCode, kind: type[Exception]
) -> None:
    for rpc, call in (("SubmitThumb", lambda: client.thumb("resp", 1)), ("Chat", lambda: list(client.chat("hi")))):
        service.fail[rpc] = [status(code, "No.")]
        with pytest.raises(kind, match=r"^No\.$"):
            call()
        assert len(service.sent(rpc)) == 1


def test_patience_ends(address: str, service: FakeService, clock: Clock) -> None:
    heard: list[tuple[str, float]] = []
    with Client(address, patience=4.0, on_wait=lambda error, seconds: heard.append((str(error), seconds))) as client:
        for rpc, call in (
            ("SubmitThumb", lambda: client.thumb("resp", THUMB_UP)),
            ("Chat", lambda: list(client.chat("hi"))),
        ):
            service.fail[rpc] = [stopping()] * 20
            with pytest.raises(UnavailableError, match=r"^Stopping\.$"):
                call()
            # After 0.2 + 0.4 + 0.8 + 1.6 s, a pause of 3.2 s would exceed the patience.
            assert (len(service.sent(rpc)), clock.pauses) == (5, [0.2, 0.4, 0.8, 1.6])
            clock.pauses.clear()
    assert heard == [("Stopping.", 4.0)] * 2


def test_without_patience_everything_is_sent_once(address: str, service: FakeService) -> None:
    service.fail["SubmitThumb"] = [stopping()]
    heard: list[object] = []
    with (
        Client(address, patience=0, on_wait=lambda *what: heard.append(what)) as client,
        pytest.raises(UnavailableError),
    ):
        client.thumb("resp", THUMB_UP)
    assert (len(service.sent("SubmitThumb")), heard) == (1, [])


def test_a_wait_is_told_in_the_log(
    client: Client, service: FakeService, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    service.fail["SubmitThumb"] = [stopping()] * 3
    client.thumb("resp", THUMB_UP)
    assert caplog.messages == ["Stopping. Retrying for up to 120 s."]


def test_the_servers_own_pause_is_kept(client: Client, service: FakeService, clock: Clock) -> None:
    service.fail["SubmitThumb"] = [stopping(2.5), stopping(0.1), stopping()]
    client.thumb("resp", THUMB_UP)
    assert clock.pauses == [2.5, 0.4, 0.8]


def test_a_pause_that_the_patience_does_not_reach_is_not_begun(client: Client, service: FakeService) -> None:
    service.fail["SubmitThumb"] = [stopping(121.0)]
    with pytest.raises(UnavailableError):
        client.thumb("resp", THUMB_UP)
    assert len(service.sent("SubmitThumb")) == 1


def test_pauses_are_shortened_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    monkeypatch.setattr(random, "uniform", uniform)
    backoff = Backoff(60.0, lambda *_: None)
    pauses = [backoff.pause_after(UnavailableError("Away.", code=AWAY)) for _ in range(7)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5]
    assert set(drawn) == {(0.5, 1.0)}


def test_a_message_to_a_server_that_is_down_is_answered_when_it_is_up(service: FakeService) -> None:
    with serving(service) as port:
        pass
    up = serving(service, port=port)
    try:
        with Client(f"127.0.0.1:{port}", patience=WAIT_SECONDS, on_wait=lambda *_: up.__enter__()) as client:
            text = "".join(event.text for event in client.chat("hi") if isinstance(event, ChatDelta))
    finally:
        up.__exit__(None, None, None)
    assert text == "Owls live in trees."
    assert len(service.sent("Chat")) == 1


# Interrupted waits. Without the interruption each pause would take a minute.


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch, service: FakeService) -> Iterator[threading.Event]:
    """Set when a call starts to wait for its retry. Fails if the pause was not cut short."""
    for name in ("FIRST_SECONDS", "LONGEST_SECONDS"):
        monkeypatch.setattr(retries, name, 60.0)
    for rpc in ("Chat", "SubmitThumb"):
        service.fail[rpc] = [stopping()]
    paused = threading.Event()
    began = time.monotonic()
    yield paused
    assert time.monotonic() - began < WAIT_SECONDS
    assert all(len(service.sent(rpc)) <= 1 for rpc in ("Chat", "SubmitThumb"))


@pytest.fixture
def waiting(address: str, paused: threading.Event) -> Iterator[Client]:
    with Client(address, user="ana", on_wait=lambda *_: paused.set()) as client:
        yield client


def test_cancelling_a_stream_ends_its_wait(waiting: Client, paused: threading.Event) -> None:
    stream = waiting.chat("hi")
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(list, stream)
        assert paused.wait(WAIT_SECONDS)
        stream.cancel()
        assert heard.result(WAIT_SECONDS) == []


@pytest.mark.parametrize("call", ["thumb", "chat"])
def test_closing_the_client_ends_its_waits(waiting: Client, paused: threading.Event, call: str) -> None:
    def wait() -> object:
        return waiting.thumb("resp", THUMB_UP) if call == "thumb" else list(waiting.chat("hi"))

    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(wait)
        assert paused.wait(WAIT_SECONDS)
        waiting.close()
        with pytest.raises(UnavailableError, match="This program closed the connection"):
            waits.result(WAIT_SECONDS)


async def begun(client: AsyncClient, paused: threading.Event) -> tuple[AsyncStream[ChatEvent], asyncio.Task[Any]]:
    """A stream that waits for its retry, and the task that reads it."""
    stream = client.chat("hi")
    task = asyncio.create_task(collect(stream))
    assert await asyncio.to_thread(paused.wait, WAIT_SECONDS)
    return stream, task


async def collect(stream: AsyncStream[ChatEvent]) -> list[ChatEvent]:
    return [event async for event in stream]


@pytest.fixture
async def async_waiting(address: str, paused: threading.Event) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address, user="ana", on_wait=lambda *_: paused.set()) as client:
        yield client


async def test_cancelling_an_async_stream_ends_its_wait(async_waiting: AsyncClient, paused: threading.Event) -> None:
    stream, task = await begun(async_waiting, paused)
    stream.cancel()
    assert await task == []


async def test_cancelling_the_task_ends_its_wait(async_waiting: AsyncClient, paused: threading.Event) -> None:
    _, task = await begun(async_waiting, paused)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_the_task_of_a_vote_ends_its_wait(async_waiting: AsyncClient, paused: threading.Event) -> None:
    vote = asyncio.create_task(async_waiting.thumb("resp", THUMB_UP))
    assert await asyncio.to_thread(paused.wait, WAIT_SECONDS)
    vote.cancel()
    with pytest.raises(asyncio.CancelledError):
        await vote


async def test_a_timeout_around_a_wait_is_a_timeout(async_waiting: AsyncClient, paused: threading.Event) -> None:
    _, task = await begun(async_waiting, paused)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await task


async def test_closing_the_async_client_ends_its_waits(async_waiting: AsyncClient, paused: threading.Event) -> None:
    _, task = await begun(async_waiting, paused)
    await async_waiting.close()
    with pytest.raises(UnavailableError, match="This program closed the connection"):
        await task


# The page


@pytest.mark.parametrize(("method", "sent"), [("GET", 1), ("POST", 5)])
async def test_a_page_that_is_looked_at_does_not_wait_and_a_vote_on_it_does(
    address: str, service: FakeService, clock: Clock, method: str, sent: int
) -> None:
    async with AsyncClient(address, patience=0) as client:
        doorkeeper = Doorkeeper(client, "ann", secure=False)
        person = await doorkeeper.enter(Request({"type": "http", "method": method, "headers": []}))
        service.fail["SubmitThumb"] = list(itertools.repeat(stopping(), 20))
        with pytest.raises(UnavailableError):
            await person.client.thumb("resp", THUMB_UP)
    # A page's patience is 3 s: 0.2 + 0.4 + 0.8 + 1.6.
    assert len(service.sent("SubmitThumb")) == sent
