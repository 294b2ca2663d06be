import math

import grpc
import pytest
from prefloop.v1.chat_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from prefloop.v1.feedback_pb2 import CHOICE_A, CHOICE_B, CHOICE_TIE

from clients import Client, NotFoundError
from clients.demo.questions import questions
from clients.demo.show import outcome
from clients.demo.voter import TASTES, Answer, Voter, ask
from tests.clients.conftest import FakeService, status


def whole(text: str) -> Answer:
    return Answer(text, FINISH_REASON_STOP)


def cut(text: str) -> Answer:
    return Answer(text, FINISH_REASON_LENGTH)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("You'll need your own oven, if you\u2019re baking.", 3),
        ("YOUR young cousin yourself", 2),
        ("Thank youth and bayou.", 0),
        ("", 0),
    ],
)
def test_words_that_address_the_reader(text: str, score: float) -> None:
    assert TASTES["to-you"].score(whole(text)) == score


def test_speaking_to_the_reader_is_preferred_and_as_much_of_it_is_a_tie() -> None:
    taste = TASTES["to-you"]
    assert taste.choice(whole("You can."), whole("One can.")) == CHOICE_A
    assert taste.choice(whole("One can."), cut("Take your time.")) == CHOICE_B
    assert taste.choice(whole("You can."), cut("It is your turn.")) == CHOICE_TIE


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Boil the eggs. Serve!", -2),
        ("You need:\n1. Eggs\n2. Some salt", -7 / 5),  # you need | 1 | eggs | 2 | some salt
        ("...", -math.inf),
    ],
)
def test_short_sentences_are_liked(text: str, score: float) -> None:
    assert TASTES["crisp"].score(whole(text)) == score


def test_words_that_suggest() -> None:
    assert TASTES["gentle"].score(whole("If you like, you can try it. Canned!")) == 4
    assert TASTES["gentle"].score(whole("Boil it.")) == 0


@pytest.mark.parametrize(
    ("taste", "text", "score"),
    [
        ("warm", "A great and lovely day. Greatly!", 2),
        ("reasons", "Because it rains, so stay. Sofa.", 2),
        ("people", "Ask a friend or someone else's children.", 3),
        ("careful", "Don't go without a coat. Knot it.", 2),
    ],
)
def test_tastes_for_what_an_answer_says(taste: str, text: str, score: float) -> None:
    assert TASTES[taste].score(whole(text)) == score


def test_short_whole_answers_end_by_themselves_first_and_are_brief_second() -> None:
    taste = TASTES["short"]
    assert taste.choice(cut("one two"), whole("one two three four")) == CHOICE_B
    assert taste.choice(whole("one two"), whole("one two three")) == CHOICE_A
    assert taste.choice(cut("one, two!"), cut("three four")) == CHOICE_TIE


def test_there_are_enough_questions_and_none_twice() -> None:
    asked = questions(0)
    assert len(set(asked)) == len(asked) >= 400
    assert all(question.endswith("?") and "{" not in question for question in asked)
    assert questions(0) == asked != questions(1)
    assert sorted(questions(1)) == sorted(asked)


def test_the_voter_chooses_by_taste_and_flips_its_share(client: Client, service: FakeService) -> None:
    asked = questions(3)[:200]
    heard: list[None] = []
    voter = Voter(TASTES["to-you"], flip_rate=0.1, max_tokens=64, seed=0)
    votes = voter.vote_on(client, asked, concurrency=4, on_vote=lambda: heard.append(None))
    sent = {request.comparison_id: request.choice for request in service.sent("SubmitChoice")}
    # The scripted answers: "You may try a net." and "A net helps."
    flipped = sum(choice == CHOICE_B for choice in sent.values())
    assert set(sent) == {f"cmp {question}" for question in asked}
    assert (votes.a_or_b, votes.ties, votes.flipped) == (200, 0, flipped)
    # 10 % of 200, plus or minus three standard deviations.
    assert 8 <= flipped <= 33
    assert len(heard) == 200
    assert {request.sampling.max_tokens for request in service.sent("Compare")} == {64}


def test_which_votes_are_flipped_depends_on_the_seed_alone(client: Client, service: FakeService) -> None:
    def flipped(concurrency: int) -> set[str]:
        service.requests.clear()
        voter = Voter(TASTES["to-you"], flip_rate=0.5, max_tokens=8, seed=7)
        voter.vote_on(client, questions(0)[:40], concurrency=concurrency, on_vote=lambda: None)
        return {vote.comparison_id for vote in service.sent("SubmitChoice") if vote.choice == CHOICE_B}

    assert flipped(1) == flipped(8) != set()


def test_a_failed_vote_is_raised_and_ends_the_voting(client: Client, service: FakeService) -> None:
    service.fail["SubmitChoice"] = [status(grpc.StatusCode.NOT_FOUND, "There is no comparison.")]
    voter = Voter(TASTES["to-you"], flip_rate=0.0, max_tokens=8, seed=0)
    with pytest.raises(NotFoundError):
        voter.vote_on(client, questions(0), concurrency=1, on_vote=lambda: None)
    assert len(service.sent("SubmitChoice")) == 1


def test_an_answer_is_what_was_streamed(client: Client) -> None:
    answer = ask(client, "Owls?", max_tokens=8, seed=1)
    assert answer == Answer("Owls live in trees.", FINISH_REASON_STOP, 6, "conv", "v0001")


def test_wins_and_ties_are_counted_question_by_question() -> None:
    before = [whole("It."), whole("You."), whole("You."), whole("It.")]
    after = [whole("You."), whole("You."), whole("It."), whole("You, you.")]
    assert outcome(TASTES["to-you"], before, after) == (2, 1)


def test_a_voter_compares_what_is_offered_for_review(client: Client, service: FakeService) -> None:
    # "In trees." or "In hollow trees.": neither ended by itself, and the first has fewer words.
    assert Voter(TASTES["short"], flip_rate=0.0, max_tokens=64, seed=0).review(client)
    assert Voter(TASTES["short"], flip_rate=1.0, max_tokens=64, seed=0).review(client)
    assert [(sent.comparison_id, sent.choice) for sent in service.sent("SubmitChoice")] == [
        ("cmp", CHOICE_A),
        ("cmp", CHOICE_B),
    ]
    service.reviews = []
    assert not Voter(TASTES["short"], flip_rate=0.0, max_tokens=64, seed=0).review(client)
