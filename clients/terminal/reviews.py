"""Pairs of answers to compare, one after another, until the user stops or none is left."""

from collections.abc import Callable

from prefloop.v1.chat_pb2 import SLOT_A, SLOT_B
from prefloop.v1.feedback_pb2 import ROLE_USER
from prefloop.v1.review_pb2 import Review

from clients.client import Client
from clients.terminal.open_conversation import CHOICES
from clients.terminal.screen import CHOICE_WORDS, Screen
from clients.text import printable

SKIP = "s"


def compare_answers(client: Client, screen: Screen, read: Callable[[str], str]) -> None:
    """Shows pair after pair and sends the choices."""
    compared = False
    while True:
        found = client.review()
        if not found.HasField("review"):
            screen.note("That was the last one." if compared else "There is nothing to compare right now.")
            return
        compared = True
        _show(screen, found.review)
        answer = _ask(read, found.waiting)
        if not answer:
            return
        if answer == SKIP:
            client.skip_review(found.review.comparison.comparison_id)
        else:
            client.choose(found.review.comparison.comparison_id, CHOICES[answer])
            screen.note(f"{CHOICE_WORDS[CHOICES[answer]]}, saved")


def _show(screen: Screen, review: Review) -> None:
    for message in review.messages:
        asked = message.role == ROLE_USER
        screen.say(f"> {printable(message.content)}" if asked else printable(message.content), "bold" if asked else "")
    screen.answers({SLOT_A: review.comparison.a.text, SLOT_B: review.comparison.b.text}, {})


def _ask(read: Callable[[str], str], waiting: int) -> str:
    """One of a, b, t, x and s; empty to stop."""
    while True:
        answer = read(f"{waiting} to compare; better: a, b, t (tie), x (both bad), s to skip, Enter to stop> ")
        if (answer := answer.strip().lower()) in ("", SKIP, *CHOICES):
            return answer
