import io
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from prefloop.v1.chat_pb2 import (
    COMPARISON_STATE_CHOSEN,
    COMPARISON_STATE_OPEN,
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    SLOT_B,
    Comparison,
    Response,
    Turn,
    Usage,
    VersionSpan,
)
from prefloop.v1.feedback_pb2 import (
    CHOICE_B,
    CHOICE_TIE,
    FEEDBACK_KIND_CHOICE,
    FEEDBACK_KIND_CORRECTION,
    FEEDBACK_KIND_THUMB,
    THUMB_DOWN,
    THUMB_UP,
    Feedback,
)
from rich.console import Console

from clients import Client
from clients.terminal.session import Edit, Terminal
from tests.clients.conftest import ANSWERED, FakeService, status

Session = Callable[..., str]


@pytest.fixture
def session(client: Client) -> Session:
    """Types lines into a terminal chat and returns its output."""

    def run(*lines: str, width: int = 80, edit: Edit | None = None) -> str:
        typed = iter(lines)

        def read(prompt: str) -> str:
            for line in typed:
                return line
            raise EOFError

        screen = io.StringIO()
        Terminal(client, Console(file=screen, width=width, height=24), read, edit).run()
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


def test_reviews_are_compared_one_after_another_until_none_is_left(session: Session, service: FakeService) -> None:
    service.reviews *= 2
    screen = session("/review", "q", "b", "s", width=100)
    assert "> Where do owls live?" in screen
    assert any("In trees." in line and "In hollow trees." in line for line in screen.splitlines())
    assert "B is better, saved" in screen
    assert "That was the last one." in session("/review", "s")
    (vote,) = service.sent("SubmitChoice")
    assert (vote.comparison_id, vote.choice) == ("cmp", CHOICE_B)
    assert [request.comparison_id for request in service.sent("SkipReview")] == ["cmp", "cmp"]
    assert "There is nothing to compare right now." in session("/review")


def test_enter_leaves_the_reviews_for_the_chat(session: Session, service: FakeService) -> None:
    session("/review", "", "Where do owls live?")
    assert service.sent("SubmitChoice") == service.sent("SkipReview") == []
    assert [request.message for request in service.sent("Chat")] == ["Where do owls live?"]


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
    assert "equally good; continuing with B" in screen
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
    assert "retracted: thumb up" in session("hi", "/undo")
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
    corrected = Response(feedback=[Feedback(kind=FEEDBACK_KIND_CORRECTION, correction="Hollow trees.")])
    comparison = Comparison(state=COMPARISON_STATE_CHOSEN, continued_with=SLOT_B, feedback=choice, b=corrected)
    service.conversation.turns.extend([Turn(message="Owls?", response=response), Turn(comparison=comparison)])
    service.conversation.turns.append(Turn(given_answer="Welcome!"))
    screen = session("hi", "/history")
    assert "Welcome!\n" in screen
    assert "> Owls?\nTrees.\nv0000 -> v0001 · 9 tokens · cut at the length limit · thumb up (right)\n" in screen
    assert "equally good; continued with B · B: corrected to: Hollow trees.\n" in screen


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
    assert "thumb up, saved" in screen


def test_an_answer_that_broke_off_is_fetched_again_and_goes_on_where_it_stopped(
    session: Session, service: FakeService
) -> None:
    service.breaking = True
    kept = Response(
        response_id="resp", text="Owls live", finish_reason=FINISH_REASON_ERROR, usage=Usage(completion_tokens=2)
    )
    service.conversation.turns.append(Turn(message="hi", response=kept))
    screen = session("hi", "/up")
    assert screen.count("Owls") == 1
    assert "The engine died.\nWaiting up to 180 s for the stored answer; Ctrl-C stops waiting.\nlive\n" in screen
    assert "2 tokens · cut off by an error · /retry asks again\n" in screen
    assert "thumb up, saved" in screen
    assert len(service.sent("Chat")) == 1


def test_waiting_for_a_broken_answer_can_be_stopped(
    session: Session, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    service.breaking = True
    monkeypatch.setattr(Client, "refetch", interrupted)
    assert "/history shows it later, /retry asks again.\n" in session("hi")


def test_a_comparison_that_broke_off_and_was_kept_whole_is_still_chosen_from(
    session: Session, service: FakeService
) -> None:
    service.breaking = True
    a, b = (Response(response_id=f"resp{slot}", finish_reason=FINISH_REASON_STOP) for slot in (1, 2))
    comparison = Comparison(comparison_id="cmp fish?", state=COMPARISON_STATE_OPEN, a=a, b=b, continued_with=SLOT_B)
    service.conversation.turns.append(Turn(message="fish?", comparison=comparison))
    session("/compare fish?", "b")
    assert [(vote.comparison_id, vote.choice) for vote in service.sent("SubmitChoice")] == [("cmp fish?", CHOICE_B)]


def test_a_comparison_that_was_decided_or_has_no_two_whole_answers_is_not_chosen_from(
    session: Session, service: FakeService
) -> None:
    a, b = (Response(finish_reason=reason) for reason in (FINISH_REASON_STOP, FINISH_REASON_CANCELLED))
    comparison = Comparison(comparison_id="cmp", state=COMPARISON_STATE_OPEN, a=a, b=b)
    service.conversation.turns.append(Turn(message="fish?", comparison=comparison))
    session("/open conv", "a")
    comparison.b.finish_reason, comparison.state = FINISH_REASON_STOP, COMPARISON_STATE_CHOSEN
    service.conversation.turns[0].comparison.CopyFrom(comparison)
    session("/open conv", "b")
    assert service.sent("SubmitChoice") == []
    assert [chat.message for chat in service.sent("Chat")] == ["a", "b"]


def test_asking_again_is_another_question_once_an_answer_had_started(session: Session, service: FakeService) -> None:
    assert "No message was sent yet." in session("/retry")
    session("hi", "/retry", "/retry", "/compare fish?", "", "/retry", "")
    chats, compares = service.sent("Chat"), service.sent("Compare")
    assert [(chat.message, chat.conversation_id) for chat in chats] == [("hi", ""), ("hi", "conv"), ("hi", "conv")]
    assert [compare.message for compare in compares] == ["fish?", "fish?"]
    assert len({request.request_id for request in chats + compares}) == 5


def test_a_message_to_a_server_that_is_away_for_a_moment_is_answered(session: Session, service: FakeService) -> None:
    service.fail["Chat"] = [status(grpc.StatusCode.UNAVAILABLE, "Stopping.")]
    assert "Owls live in trees.\nv0001 · 6 tokens\n" in session("hi")
    first, second = service.sent("Chat")
    assert first == second


def test_asking_again_before_an_answer_started_waits_and_is_the_same_request(
    session: Session, client: Client, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.patience = 0.0
    gone = status(grpc.StatusCode.UNAVAILABLE, "Stopping.")
    service.fail["Chat"] = [gone, gone]
    waited: list[int] = []
    monkeypatch.setattr(Client, "wait_until_serving", lambda client, timeout: waited.append(len(service.sent("Chat"))))
    screen = session("hi", "/retry", "/open conv", "/retry", "/retry")
    # Before each call except the last, which follows a complete answer.
    assert waited == [1, 2]
    assert screen.count("Stopping.") == 2
    assert "for the stored answer" not in screen
    first, again, elsewhere, _ = service.sent("Chat")
    assert first == again
    service.fail["Chat"] = [gone]
    session("hi", "/retry", "/retry")
    assert waited == [1, 2, 5]
    # In another conversation it is a different request and must not reuse the id.
    assert (elsewhere.message, elsewhere.conversation_id) == ("hi", "conv")
    assert elsewhere.request_id != first.request_id


def test_deleting_asks_first(session: Session, service: FakeService) -> None:
    service.conversation.title = "Where do owls live?"
    screen = session(
        "/delete", "hi", "/delete", "", "again", "/delete", "y", "new", "/conversations", "/delete 2", "y", "/open 2"
    )
    assert "This conversation is empty." in screen
    assert "not deleted\n" in screen
    assert [request.conversation_id for request in service.sent("DeleteConversation")] == ["conv", "older"]
    assert [request.conversation_id for request in service.sent("Chat")] == ["", "conv", ""]
    # The earlier list no longer applies, so 2 is read as an id.
    assert service.sent("GetConversation")[-1].conversation_id == "2"


def test_the_last_answer_is_corrected_by_editing_it(session: Session, service: FakeService) -> None:
    service.conversation.turns.append(ANSWERED)
    edited: list[str] = []

    def edit(prompt: str, text: str) -> str:
        edited.append(text)
        return text.replace("trees", "hollow trees")

    assert "correction saved" in session("hi", "/correct", edit=edit)
    assert edited == ["Owls live in trees."]
    (correction,) = service.sent("SubmitCorrection")
    assert (correction.response_id, correction.text) == ("resp", "Owls live in hollow trees.")


@pytest.mark.parametrize("left", [lambda text: text, lambda text: text + "\n", lambda text: ""])
def test_what_was_not_changed_is_no_correction(
    session: Session, service: FakeService, left: Callable[[str], str]
) -> None:
    service.conversation.turns.append(ANSWERED)
    assert "nothing was sent" in session("hi", "/correct", edit=lambda prompt, text: left(text))
    assert service.sent("SubmitCorrection") == []


@pytest.mark.parametrize("key", [KeyboardInterrupt, EOFError])
def test_leaving_the_editor_keeps_the_session(session: Session, service: FakeService, key: type[BaseException]) -> None:
    def leave(prompt: str, text: str) -> str:
        raise key

    service.conversation.turns.append(ANSWERED)
    screen = session("hi", "/correct", "/up", edit=leave)
    assert "Nothing was changed, so nothing was sent.\nthumb up, saved" in screen
    assert "Write the better answer after /correct." in session("hi", "/correct")


def test_a_demonstration_is_a_question_and_its_best_answer_and_can_be_undone(
    session: Session, service: FakeService
) -> None:
    screen = session("/demonstrate What do owls eat?", "Mice.", "/undo", "/undo", "/demonstrate")
    (given,) = service.sent("SubmitDemonstration")
    assert [message.content for message in given.messages] == ["What do owls eat?", "Mice."]
    assert [request.feedback_id for request in service.sent("RetractFeedback")] == ["fb"]
    assert "retracted: demonstration: What do owls eat?\nYou have no votes" in screen
    assert "Write a question after /demonstrate" in screen
    session("/demonstrate What do owls eat?", edit=lambda prompt, text: "Mice\nand voles.")
    assert service.sent("SubmitDemonstration")[1].messages[1].content == "Mice\nand voles."
