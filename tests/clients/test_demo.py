import grpc
import pytest
from prefloop.v1.chat_pb2 import FINISH_REASON_STOP, Response, Turn, VersionSpan
from prefloop.v1.policy_pb2 import Replica

from clients import Client, ServerError
from clients.demo import crossing, wait_until_served
from clients.live import STREAMS, LiveStreams
from clients.serving import DemoError
from clients.voter import Answer
from tests.clients.conftest import WAIT_SECONDS, FakeService, status


def test_an_answer_that_two_versions_made_is_told_in_words(client: Client, service: FakeService) -> None:
    answer = Answer("text", FINISH_REASON_STOP, conversation_id="conv")
    spans = [VersionSpan(start=0, end=42, policy_version="v0000")]
    service.conversation.turns.append(Turn(response=Response(spans=spans)))
    assert crossing(client, answer) == ""
    service.conversation.turns[0].response.spans.append(VersionSpan(start=42, end=300, policy_version="v0001"))
    assert crossing(client, answer) == "v0000 made tokens 0-41, v0001 made tokens 42-299"


def test_the_new_version_must_be_active_and_loaded(client: Client, service: FakeService) -> None:
    # The scripted server says that v0001 is active.
    service.replicas = [Replica(loaded_version="v0001")]
    wait_until_served(client, "v0001")
    with pytest.raises(DemoError, match="v0001 is active after the round, not v0002"):
        wait_until_served(client, "v0002")


def test_a_server_that_stays_behind_is_told_with_its_reason(
    client: Client, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.demo.SWAP_SECONDS", 0)
    service.replicas = [Replica(loaded_version="v0000", error="v0001: a file is missing.")]
    with pytest.raises(DemoError, match=r"did not load v0001 in 0 s. v0001: a file is missing\.$"):
        wait_until_served(client, "v0001")


def test_live_streams_go_on_until_they_are_stopped_and_end_whole(client: Client, service: FakeService) -> None:
    service.hold.clear()
    live = LiveStreams(client)
    assert not live.running
    live.start()
    # All of them are open at once.
    assert all(service.begun.acquire(timeout=WAIT_SECONDS) for _ in range(STREAMS))
    service.hold.set()
    answers = live.stop()
    assert len(answers) >= STREAMS
    assert {answer.text for answer in answers} == {"Owls live in trees."}


def test_a_broken_live_stream_is_raised(client: Client, service: FakeService) -> None:
    service.fail["Chat"] = [status(grpc.StatusCode.INTERNAL, "Something went wrong.")]
    live = LiveStreams(client)
    live.start()
    assert service.begun.acquire(timeout=WAIT_SECONDS)
    with pytest.raises(ServerError):
        live.stop()
