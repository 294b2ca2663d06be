import io
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from prefloop.v1.chat_pb2 import (
    COMPARISON_STATE_CHOSEN,
    FINISH_REASON_LENGTH,
    SLOT_B,
    Comparison,
    Response,
    Turn,
    Usage,
    VersionSpan,
)
from prefloop.v1.feedback_pb2 import (
    CHOICE_TIE,
    FEEDBACK_KIND_CHOICE,
    FEEDBACK_KIND_THUMB,
    THUMB_DOWN,
    THUMB_UP,
    Feedback,
)
from rich.console import Console

from clients import Client
from clients.terminal import Terminal
from tests.clients.conftest import FakeService, status

Session = Callable[..., str]


@pytest.fixture
def session(client: Client) -> Session:
    """Types lines into a terminal chat and returns what the screen showed."""

    def run(*lines: str, width: int = 80) -> str:
        typed = iter(lines)

        def read(prompt: str) -> str:
            for line in typed:
                return line
            raise EOFError

        screen = io.StringIO()
        Terminal(client, Console(file=screen, width=width, height=24), read).run()
        return screen.getvalue()

    return run


def test_an_answer_is_shown_with_the_version_that_made_it(session: Session) -> None:
    screen = session("Where do owls live?", "/quit", "never sent")
    assert "Owls live in trees.\nv0001 · 6 tokens\n" in screen
    assert "never sent" not in screen


def test_the_next_message_goes_on_in_the_conversation_until_new(session: Session, service: FakeService) -> None:
    session("one", "two", "/new", "three")
    assert [request.conversation_id for request in service.sent("Chat")] == ["", "conv", ""]


def test_thumbs_are_about_the_last_answer(session: Session, service: FakeService) -> None:
    screen = session("/up", "hi", "/down too short")
    assert "There is no answer here to vote on." in screen
    (vote,) = service.sent("SubmitThumb")
    assert (vote.response_id, vote.thumb, vote.comment) == ("resp", THUMB_DOWN, "too short")


def test_answers_stand_side_by_side_where_there_is_room(session: Session) -> None:
    lines = session("/compare fish?", "", width=100).splitlines()
    assert any("You may try a net." in line and "A net helps." in line for line in lines)


def test_answers_stand_one_below_the_other_at_80_columns(session: Session) -> None:
    lines = session("/compare fish?", "", width=80).splitlines()
    (first,) = (number for number, line in enumerate(lines) if "You may try a net." in line)
    (second,) = (number for number, line in enumerate(lines) if "A net helps." in line)
    assert first < second
    assert max(map(len, lines)) <= 80


def test_after_a_choice_votes_are_about_the_answer_that_goes_on(session: Session, service: FakeService) -> None:
    comparison = Comparison(
        comparison_id="cmp fish?",
        state=COMPARISON_STATE_CHOSEN,
        a=Response(response_id="resp1"),
        b=Response(response_id="resp2"),
        continued_with=SLOT_B,
    )
    service.conversation.turns.append(Turn(message="fish?", comparison=comparison))
    screen = session("/compare fish?", "what?", "t", "/up")
    assert "equally good; going on with B" in screen
    assert service.sent("SubmitChoice")[0].choice == CHOICE_TIE
    assert service.sent("SubmitThumb")[0].response_id == "resp2"


def test_a_thumb_after_a_skipped_comparison_is_about_the_answer_it_goes_on_with(
    session: Session, service: FakeService
) -> None:
    session("hi", "/compare fish?", "", "/up")
    assert service.sent("SubmitChoice") == []
    assert service.sent("SubmitThumb")[0].response_id == "resp1"


def test_compare_alone_turns_every_message_into_a_comparison(session: Session, service: FakeService) -> None:
    session("/compare", "fish?", "", "/compare", "owls?")
    assert [request.message for request in service.sent("Compare")] == ["fish?"]
    assert [request.message for request in service.sent("Chat")] == ["owls?"]


def test_undo_takes_back_the_latest_vote_the_server_knows(session: Session, service: FakeService) -> None:
    votes = [
        Feedback(feedback_id=name, kind=FEEDBACK_KIND_THUMB, thumb=THUMB_UP, create_time=Timestamp(seconds=seconds))
        for name, seconds in (("early", 1), ("late", 9))
    ]
    service.conversation.turns.append(Turn(response=Response(feedback=[votes[1]])))
    service.conversation.turns.append(Turn(response=Response(feedback=[votes[0]])))
    assert "taken back: thumb up" in session("hi", "/undo")
    assert [request.feedback_id for request in service.sent("RetractFeedback")] == ["late"]


def test_history_shows_votes_versions_and_endings(session: Session, service: FakeService) -> None:
    response = Response(
        text="Trees.",
        finish_reason=FINISH_REASON_LENGTH,
        usage=Usage(completion_tokens=9),
        spans=[
            VersionSpan(start=0, end=4, policy_version="v0000"),
            VersionSpan(start=4, end=9, policy_version="v0001"),
        ],
        feedback=[Feedback(kind=FEEDBACK_KIND_THUMB, thumb=THUMB_UP, comment="right")],
    )
    choice = Feedback(kind=FEEDBACK_KIND_CHOICE, choice=CHOICE_TIE)
    comparison = Comparison(state=COMPARISON_STATE_CHOSEN, continued_with=SLOT_B, feedback=choice)
    service.conversation.turns.extend([Turn(message="Owls?", response=response), Turn(comparison=comparison)])
    screen = session("hi", "/history")
    assert "> Owls?\nTrees.\nv0000 -> v0001 · 9 tokens · cut at the length limit · thumb up (right)\n" in screen
    assert "equally good; went on with B" in screen


def test_a_listed_conversation_is_opened_by_its_number(session: Session, service: FakeService) -> None:
    assert "newer" in session("/conversations", "/open 2")
    assert service.sent("GetConversation")[0].conversation_id == "older"


def test_a_failed_call_is_one_sentence_and_the_session_goes_on(session: Session, service: FakeService) -> None:
    service.fail["Chat"] = [status(grpc.StatusCode.INVALID_ARGUMENT, "The message is too long.")]
    screen = session("first", "second")
    assert "The message is too long." in screen
    assert "Traceback" not in screen
    assert "Owls live in trees." in screen


def test_an_unknown_command_is_not_sent_as_a_message(session: Session, service: FakeService) -> None:
    assert "There is no command /upp" in session("/upp")
    assert service.sent("Chat") == []


def test_help_names_every_command(session: Session, client: Client) -> None:
    screen = session("/help")
    for command in Terminal(client, Console(), input).commands:
        assert command in screen


def test_ctrl_c_stops_the_answer_and_not_the_session(
    session: Session, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.hold.clear()

    def interrupted(terminal: Terminal, text: str) -> None:
        service.hold.set()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clients.text.WordWrap.feed", interrupted)
        screen = session("hi", "/up")
    assert "stopped" in screen
    assert "thumb up, kept" in screen
