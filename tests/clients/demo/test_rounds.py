import io
import itertools

import grpc
import pytest
from prefloop.v1.chat_pb2 import FINISH_REASON_STOP, Response, Turn, VersionSpan
from prefloop.v1.policy_pb2 import (
    ROUND_STATE_FAILED,
    ROUND_STATE_REJECTED,
    ROUND_STATE_RUNNING,
    Replica,
    Round,
    RoundState,
)
from rich.console import Console

from clients import Client, ServerError
from clients.demo.processes import DemoError
from clients.demo.progress import Task
from clients.demo.rounds import Lines, crossing, near_the_swap, wait_until_served
from clients.demo.streams import STREAMS, LongStreams
from clients.demo.time_limit import Limit
from clients.demo.voter import Answer
from tests.clients.conftest import WAIT_SECONDS, FakeService, status


def test_an_answer_that_two_versions_made_is_told_in_words(client: Client, service: FakeService) -> None:
    answer = Answer("text", FINISH_REASON_STOP, conversation_id="conv")
    spans = [VersionSpan(start=0, end=42, policy_version="v0000")]
    service.conversation.turns.append(Turn(response=Response(spans=spans)))
    assert crossing(client, answer) == ""
    service.conversation.turns[0].response.spans.append(VersionSpan(start=42, end=300, policy_version="v0001"))
    assert crossing(client, answer) == "v0000 made tokens 0-41, v0001 made tokens 42-299"


def test_the_new_version_must_be_active_and_loaded(client: Client, service: FakeService) -> None:
    # The scripted server reports v0001 as active.
    service.replicas = [Replica(loaded_version="v0001")]
    wait_until_served(client, "v0001", Limit("The swap", WAIT_SECONDS))
    with pytest.raises(DemoError, match="v0001 is active after the round, not v0002"):
        wait_until_served(client, "v0002", Limit("The swap", WAIT_SECONDS))


def test_a_server_that_stays_behind_is_told_with_its_reason(client: Client, service: FakeService) -> None:
    service.replicas = [Replica(loaded_version="v0000", error="v0001: a file is missing.")]
    late = itertools.count()
    limit = Limit("Loading v0001", 2.0, now=lambda: float(next(late)))
    with pytest.raises(DemoError, match=r"^Loading v0001 took longer than 2 s\. v0001: a file is missing\.$"):
        wait_until_served(client, "v0001", limit)


def test_live_streams_go_on_until_they_are_stopped_and_end_whole(client: Client, service: FakeService) -> None:
    service.hold.clear()
    live = LongStreams(client)
    assert not live.running
    live.start()
    # All streams are open at once.
    assert all(service.begun.acquire(timeout=WAIT_SECONDS) for _ in range(STREAMS))
    service.hold.set()
    answers = live.stop()
    assert len(answers) >= STREAMS
    assert {answer.text for answer in answers} == {"Owls live in trees."}


def test_a_broken_live_stream_is_raised(client: Client, service: FakeService) -> None:
    service.fail["Chat"] = [status(grpc.StatusCode.INTERNAL, "Something went wrong.")]
    live = LongStreams(client)
    live.start()
    assert service.begun.acquire(timeout=WAIT_SECONDS)
    with pytest.raises(ServerError):
        live.stop()


@pytest.mark.parametrize(
    ("state", "stage", "near"),
    [
        (ROUND_STATE_RUNNING, "improve", False),
        (ROUND_STATE_RUNNING, "gate", True),
        (ROUND_STATE_RUNNING, "publish", True),
        # An earlier round; the new one has not begun.
        (ROUND_STATE_FAILED, "gate", False),
        (ROUND_STATE_REJECTED, "activate", False),
    ],
)
def test_streams_wait_for_the_last_stages_of_the_round_that_runs(
    client: Client, monkeypatch: pytest.MonkeyPatch, state: RoundState.ValueType, stage: str, near: bool
) -> None:
    monkeypatch.setattr(client, "rounds", lambda: iter([Round(round_id="round_1", state=state, stage=stage)]))
    assert near_the_swap(client) is near


def test_a_line_that_only_says_the_time_is_no_progress() -> None:
    told: list[str] = []

    class Told(Limit):
        def progress(self) -> None:
            told.append(task.now)

    screen = io.StringIO()
    task = Task("a round of the learner")
    lines = Lines(Console(file=screen, width=40), task, Told("The round", 60.0))
    for line in (
        "loading the libraries: 4.0 s",
        "starting the engine, 10 s so far",
        "starting the engine, 20 s so far",
        "judging candidates: 1 of 5, 100 s so far, about 400 s left",
        "judging candidates: 1 of 5, 110 s so far, about 440 s left",
        "judging candidates: 2 of 5, 120 s so far, about 180 s left",
        "",
    ):
        lines.hear(line)
    assert told == ["", "starting the engine", "judging candidates: 1 of 5", "judging candidates: 2 of 5"]
    assert screen.getvalue() == "loading the libraries: 4.0 s\n"
