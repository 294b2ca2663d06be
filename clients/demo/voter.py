"""A simulated voter with a stated taste and a share of wrong votes, which votes through the API like any user.

A taste scores one answer's text. Of two answers the voter prefers the one with the higher score; equal scores are a
tie. A flipped vote chooses the answer with the lower score; ties are never flipped.
"""

import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prefloop.v1.chat_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_STOP,
    SLOT_A,
    SLOT_B,
    ChatDelta,
    ChatFinished,
    ChatStarted,
    CompareFinished,
    CompareStarted,
    FinishReason,
)
from prefloop.v1.feedback_pb2 import CHOICE_A, CHOICE_B, CHOICE_TIE, Choice

from clients.client import Client
from clients.demo.many_calls import at_once


def words_of(text: str) -> frozenset[str]:
    """The words between its spaces."""
    return frozenset(text.split())


READER = words_of("you your yours yourself you're you'll you've you'd")
GENTLE = words_of(
    "can could may might would maybe perhaps try if like feel help please enjoy recommend suggest prefer want wish "
    "often usually some sometimes consider"
)
WARM = words_of(
    "amazing beautiful best delicious enjoy excellent favorite friendly fun glad good great happy joy kind love lovely "
    "perfect thank thanks warm wonderful"
)
REASONS = words_of("because cause causes due ensure ensures reason reasons since so therefore why")
PEOPLE = words_of(
    "child children colleague colleagues community family father friend friends guests kids mother neighbor neighbour "
    "others parents partner people person someone student students team"
)
WARNING = words_of("avoid can't cannot careful doesn't don't isn't never no not shouldn't without")
FLIPPED = {CHOICE_A: CHOICE_B, CHOICE_B: CHOICE_A, CHOICE_TIE: CHOICE_TIE}


class StreamBrokenError(Exception):
    """A stream ended without its Finished event."""


@dataclass(frozen=True)
class Answer:
    """One finished answer and its ids; `tokens` counts what the model generated."""

    text: str
    finish_reason: FinishReason.ValueType
    tokens: int = 0
    conversation_id: str = ""
    policy_version: str = ""


@dataclass(frozen=True)
class Taste:
    """The voter's preference: `sentence` describes it, `score` computes it (higher is better)."""

    sentence: str
    score: Callable[[Answer], float]

    def choice(self, a: Answer, b: Answer) -> Choice.ValueType:
        """The choice of a voter who makes no mistakes."""
        score_a, score_b = self.score(a), self.score(b)
        if score_a == score_b:
            return CHOICE_TIE
        return CHOICE_A if score_a > score_b else CHOICE_B


def short_and_whole(answer: Answer) -> float:
    """Minus the number of words, plus 1000 for an answer that ended by itself."""
    return 1000.0 * (answer.finish_reason == FINISH_REASON_STOP) - len(words(answer.text))


def short_sentences(answer: Answer) -> float:
    """Minus the mean number of words between the ends of sentences or lines; minus infinity for no words."""
    sentences = [found for part in re.split(r"[.!?:\n]+", answer.text) if (found := words(part))]
    return -sum(map(len, sentences)) / len(sentences) if sentences else -math.inf


def counting(wanted: frozenset[str]) -> Callable[[Answer], float]:
    """A score: how many words are among the wanted ones."""
    return lambda answer: float(sum(word in wanted for word in words(answer.text)))


def words(text: str) -> list[str]:
    """The words of a text in lower case; an apostrophe is part of a word."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)*", text.lower().replace("\u2019", "'"))


TASTES = {
    "to-you": Taste('speaks to the reader: the more "you" and "your", the better', counting(READER)),
    "crisp": Taste("short sentences: the fewer words in each, the better", short_sentences),
    "gentle": Taste('suggests and does not command: the more "can", "may", "try", the better', counting(GENTLE)),
    "short": Taste("short whole answers: one that ends by itself, then the one with fewer words", short_and_whole),
    "warm": Taste('kind and cheerful: the more "enjoy", "great", "happy", the better', counting(WARM)),
    "reasons": Taste('says why: the more "because", "so", "reason", the better', counting(REASONS)),
    "people": Taste('about people: the more "friends", "children", "someone", the better', counting(PEOPLE)),
    "careful": Taste('says what not to do: the more "not", "avoid", "without", the better', counting(WARNING)),
}


@dataclass(frozen=True)
class Votes:
    """Numbers of votes by kind."""

    a_or_b: int
    ties: int
    flipped: int


class Voter:
    """Votes with `taste`. A share `flip_rate` of the votes that are not ties is flipped; `seed` determines which."""

    def __init__(self, taste: Taste, *, flip_rate: float, max_tokens: int, seed: int) -> None:
        self.taste = taste
        self.flip_rate = flip_rate
        self.max_tokens = max_tokens
        self.seed = seed

    def vote_on(
        self,
        client: Client,
        questions: Iterable[str],
        *,
        concurrency: int,
        on_vote: Callable[[], object],
        before_vote: Callable[[str, str], object] = lambda question, comparison_id: None,
        watch: Callable[[], object] = lambda: None,
    ) -> Votes:
        """Asks for a comparison on every question, `concurrency` at a time, and chooses. `on_vote` is called after each
        vote, `before_vote` with the question and comparison id just before it, from many threads; `watch` is as in
        `at_once`.

        The first failed call ends the voting and is raised, without waiting for pending calls.
        """

        def vote(question: str) -> tuple[Choice.ValueType, bool]:
            return self._vote(client, question, before_vote)

        cast = at_once(vote, questions, concurrency=concurrency, on_result=lambda _: on_vote(), watch=watch)
        ties = sum(choice == CHOICE_TIE for choice, _ in cast)
        return Votes(a_or_b=len(cast) - ties, ties=ties, flipped=sum(flipped for _, flipped in cast))

    def _vote(
        self, client: Client, question: str, before_vote: Callable[[str, str], object]
    ) -> tuple[Choice.ValueType, bool]:
        comparison_id, a, b = compare(client, question, self.max_tokens)
        choice, flipped = self._choice(a, b, question)
        before_vote(question, comparison_id)
        client.choose(comparison_id, choice)
        return choice, flipped

    def review(self, client: Client) -> bool:
        """Compares the next pair that is offered for review; False if there is none."""
        found = client.review()
        if not found.HasField("review"):
            return False
        comparison, question = found.review.comparison, found.review.messages[-1].content
        a, b = (Answer(one.text, one.finish_reason) for one in (comparison.a, comparison.b))
        choice, _ = self._choice(a, b, f"review {question}")
        client.choose(comparison.comparison_id, choice)
        return True

    def _choice(self, a: Answer, b: Answer, drawn_for: str) -> tuple[Choice.ValueType, bool]:
        """The vote, and whether it is flipped."""
        choice = self.taste.choice(a, b)
        # Drawn per question, so that it does not depend on the order of threads.
        flip = choice != CHOICE_TIE and random.Random(f"{self.seed} {drawn_for}").random() < self.flip_rate
        return FLIPPED[choice] if flip else choice, flip


def compare(client: Client, question: str, max_tokens: int) -> tuple[str, Answer, Answer]:
    """Asks a question in a new conversation; returns the comparison's id and both answers."""
    comparison_id = ""
    answers: dict[int, Answer] = {}
    with client.compare(question, max_tokens=max_tokens) as stream:
        for event in stream:
            match event:
                case CompareStarted():
                    comparison_id = event.comparison_id
                case CompareFinished():
                    answers[event.slot] = Answer(event.text, event.finish_reason, event.usage.completion_tokens)
    if not comparison_id or set(answers) != {SLOT_A, SLOT_B}:
        raise StreamBrokenError(f"The comparison on {question!r} ended before both answers did.")
    return comparison_id, answers[SLOT_A], answers[SLOT_B]


def ask(client: Client, question: str, *, max_tokens: int, seed: int | None = None) -> Answer:
    """Asks a question in a new conversation; returns the whole answer."""
    conversation_id = heard = ""
    with client.chat(question, max_tokens=max_tokens, seed=seed) as stream:
        for event in stream:
            match event:
                case ChatStarted():
                    conversation_id = event.conversation_id
                case ChatDelta():
                    heard += event.text
                case ChatFinished():
                    if event.finish_reason == FINISH_REASON_ERROR or heard != event.text:
                        raise StreamBrokenError(f"The answer to {question!r} was cut off or lost text in transit.")
                    return Answer(
                        event.text,
                        event.finish_reason,
                        event.usage.completion_tokens,
                        conversation_id,
                        event.policy_version,
                    )
    raise StreamBrokenError(f"The answer to {question!r} ended before it was finished.")
