"""Connections under restarts, deadlines, pings, several users and many threads."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from prefloop.v1.chat_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_STOP,
    ChatDelta,
    ChatStarted,
    Comparison,
    Response,
    Turn,
)
from prefloop.v1.feedback_pb2 import THUMB_UP

from clients import Client, NotFoundError, NotStartedError, Stream, TimedOutError, UnavailableError, channel
from clients.calls import ChatEvent
from clients.channel import KEEPALIVE_MILLISECONDS, channel_options
from server.grpc_server import OPTIONS
from tests.clients.conftest import ANSWERED, WAIT_SECONDS, FakeService, serving

KEPT = Turn(message="hi", response=Response(response_id="resp", text="Owls ", finish_reason=FINISH_REASON_ERROR))


class Restartable:
    """The service on a fixed port, which a test can stop and start."""

    def __init__(self, service: FakeService) -> None:
        self.service = service
        self._running = ExitStack()
        self.port = self._running.enter_context(serving(service))

    def stop(self) -> None:
        self._running.close()

    def start(self) -> None:
        self._running.enter_context(serving(self.service, port=self.port))


@pytest.fixture
def server(service: FakeService) -> Iterator[Restartable]:
    server = Restartable(service)
    yield server
    server.stop()


@pytest.fixture
def client(server: Restartable) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}", user="ana", timeout=WAIT_SECONDS) as client:
        yield client


def test_a_port_on_which_nobody_speaks_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "CONNECT_MILLISECONDS", 300)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Client(f"127.0.0.1:{silent.getsockname()[1]}", user="ana", timeout=WAIT_SECONDS, patience=0) as client,
        pytest.raises(UnavailableError, match="No server answers at"),
    ):
        client.caller()


def broken(client: Client, server: Restartable) -> Stream[ChatEvent]:
    """A stream whose server went away in the middle of the answer."""
    server.service.hold.clear()
    stream = client.chat("hi")
    assert isinstance(next(stream), ChatStarted)
    assert isinstance(next(stream), ChatDelta)
    server.stop()
    with pytest.raises(UnavailableError, match="broke during the answer"):
        next(stream)
    return stream


def test_a_vote_cut_off_by_a_restart_is_sent_again_with_its_id(
    client: Client, server: Restartable, service: FakeService
) -> None:
    service.hold.clear()
    with ThreadPoolExecutor(1) as pool:
        vote = pool.submit(client.thumb, "resp", THUMB_UP)
        assert service.begun.acquire(timeout=WAIT_SECONDS)
        server.stop()
        server.start()
        assert vote.result(WAIT_SECONDS).thumb == THUMB_UP
    first, second = service.sent("SubmitThumb")
    assert first.request_id == second.request_id != ""


def test_a_callers_own_request_id_is_sent(client: Client, service: FakeService) -> None:
    client.thumb("resp", THUMB_UP, request_id="mine")
    client.choose("cmp", 1, request_id="mine")
    client.correct("resp", "Trees.", request_id="mine")
    client.demonstrate([], request_id="mine")
    assert [request.request_id for request in service.requests] == ["mine"] * 4


def test_a_half_heard_stream_is_not_sent_again_and_what_was_kept_is_fetched(
    client: Client, server: Restartable, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = broken(client, server)
    unfinished = Turn(message="hi", response=Response(response_id="resp", text="Owls "))
    service.conversation.turns.extend([ANSWERED, unfinished])
    service.conversation.turns[0].response.response_id = "earlier"
    sleep, met = time.sleep, []

    def pause(seconds: float) -> None:
        """The server comes back in the first pause, and stores the answer's end after one early request for it."""
        if not met:
            met.append("no server")
            server.start()
        elif service.sent("GetConversation"):
            met.append("no end")
            service.conversation.turns[1].CopyFrom(KEPT)
        sleep(0.01)

    monkeypatch.setattr(time, "sleep", pause)
    assert client.refetch(stream, timeout=WAIT_SECONDS) == KEPT
    assert met == ["no server", "no end"]
    assert len(service.sent("Chat")) == 1


def test_fetching_gives_up_in_time(client: Client, server: Restartable) -> None:
    stream = broken(client, server)
    with pytest.raises(UnavailableError, match="No server answers"):
        client.refetch(stream, timeout=0)
    server.start()
    client.wait_until_serving(WAIT_SECONDS)
    server.service.conversation.turns.append(Turn(response=Response(response_id="resp")))
    with pytest.raises(TimedOutError, match=r"^The answer had not ended after 0 s\.$"):
        client.refetch(stream, timeout=0)


def test_a_comparison_has_ended_when_both_answers_have(client: Client, service: FakeService) -> None:
    with client.compare("fish") as stream:
        next(stream)
    assert (stream.conversation_id, stream.response_id, stream.comparison_id) == ("conv", "", "cmp fish")
    ended = Response(finish_reason=FINISH_REASON_STOP)
    service.conversation.turns.append(Turn(comparison=Comparison(comparison_id="cmp fish", a=ended)))
    with pytest.raises(TimedOutError):
        client.refetch(stream, timeout=0)
    service.conversation.turns[0].comparison.b.CopyFrom(ended)
    assert client.refetch(stream, timeout=0).comparison.comparison_id == "cmp fish"


def test_what_never_started_or_was_deleted_cannot_be_fetched(client: Client, server: Restartable) -> None:
    stream = client.chat("hi")
    assert (stream.conversation_id, stream.response_id) == ("", "")
    with pytest.raises(NotStartedError, match="ask again"):
        client.refetch(stream)
    next(stream)
    with pytest.raises(NotFoundError, match="no longer in its conversation"):
        client.refetch(stream)


def test_a_deadline_ends_the_call_on_the_server_too(address: str, service: FakeService) -> None:
    service.hold.clear()
    with Client(address, timeout=0.2) as client, pytest.raises(TimedOutError, match="did not finish in time"):
        client.conversation("conv")
    assert service.cancelled.wait(WAIT_SECONDS)


def test_closing_the_connection_ends_its_streams(client: Client, service: FakeService) -> None:
    service.hold.clear()
    stream = client.chat("hi")
    assert isinstance(next(stream), ChatStarted)
    assert isinstance(next(stream), ChatDelta)
    client.close()
    with pytest.raises(UnavailableError, match=r"^This program closed the connection to 127\.0\.0\.1:\d+\.$"):
        next(stream)
    assert service.cancelled.wait(WAIT_SECONDS)


def test_one_connection_serves_two_people_at_once(client: Client, service: FakeService) -> None:
    service.hold.clear()
    ben = client.acting_as(user="ben")
    eve = client.acting_as(api_key="key_1.secret")
    with client.chat("hi") as one, ben.chat("hi") as two, eve.chat("hi") as three:
        for stream in (one, two, three):
            next(stream)
    callers = [metadata.get("x-user-id") or metadata["authorization"] for metadata in service.metadata]
    assert sorted(callers) == ["Bearer key_1.secret", "ana", "ben"]
    assert len(set(service.peers)) == 1
    service.hold.set()
    ben.close()
    assert client.caller().user == "ana"


def test_many_threads_share_a_client(client: Client, service: FakeService) -> None:
    def ask(number: int) -> str:
        client.thumb(f"resp {number}", THUMB_UP)
        return "".join(event.text for event in client.chat("hi") if isinstance(event, ChatDelta))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(64))) == ["Owls live in trees."] * 64
    assert {vote.response_id for vote in service.sent("SubmitThumb")} == {f"resp {number}" for number in range(64)}
    assert len({vote.request_id for vote in service.sent("SubmitThumb")}) == 64
    assert len(set(service.peers)) == 1


def test_a_server_takes_the_clients_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients ping every second, 310 times as often as by default. The first server has our limit on pings, scaled
    by the same factor. The second has gRPC's default limit and hangs up, which shows that enough pings were sent."""
    faster = KEEPALIVE_MILLISECONDS / 1000
    least = "grpc.http2.min_ping_interval_without_data_ms"
    ours = {**dict(OPTIONS), least: int(dict(OPTIONS)[least] / faster)}
    monkeypatch.setattr("clients.channel.KEEPALIVE_MILLISECONDS", 1000)
    # Without data in between, gRPC sends two pings and then one per minute.
    more = ("grpc.http2.max_pings_without_data", 0)
    monkeypatch.setattr("clients.channel.channel_options", lambda address: [*channel_options(address), more])
    strict, service = FakeService(), FakeService()
    with ExitStack() as stack:
        streams = []
        for fake, options in ((service, ours), (strict, {})):
            fake.hold.clear()
            port = stack.enter_context(serving(fake, options=list(options.items())))
            stream = stack.enter_context(Client(f"127.0.0.1:{port}")).chat("hi")
            assert isinstance(next(stream), ChatStarted)
            streams.append(stream)
        assert strict.cancelled.wait(WAIT_SECONDS)
        with pytest.raises(UnavailableError):
            list(streams[1])
        service.hold.set()
        assert "".join(event.text for event in streams[0] if isinstance(event, ChatDelta)) == "Owls live in trees."
