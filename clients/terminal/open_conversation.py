"""The conversation that is open in a terminal: messages and their answers, and the choice between two.

An answer whose stream breaks is fetched again once the server is back, and never asked for twice by itself. Ctrl-C
stops the answer that is being streamed.
"""

import uuid
from collections.abc import Callable

from prefloop.v1.chat_pb2 import (
    COMPARISON_STATE_OPEN,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    SLOT_A,
    SLOT_B,
    ChatDelta,
    ChatFinished,
    ChatStarted,
    CompareDelta,
    CompareFinished,
    CompareStarted,
    Comparison,
    Conversation,
    Response,
    Slot,
    Turn,
)
from prefloop.v1.feedback_pb2 import CHOICE_A, CHOICE_B, CHOICE_BOTH_BAD, CHOICE_TIE, Choice
from rich.live import Live

from clients.calls import ChatEvent, CompareEvent, Stream
from clients.client import Client
from clients.errors import PrefloopError
from clients.terminal.screen import CHOICE_WORDS, ENDINGS, SLOT_NAMES, Screen, footer, response_words
from clients.text import printable

# An engine that died is back within a minute or two.
RETURN_SECONDS = 180.0
CHOICES: dict[str, Choice.ValueType] = {"a": CHOICE_A, "b": CHOICE_B, "t": CHOICE_TIE, "x": CHOICE_BOTH_BAD}


class Asked:
    """A message, and whether for two answers. Its id makes the server answer it once, however often it is sent, until
    the answer has `started`; from then on it is another question, even in the same words."""

    def __init__(self, message: str = "", conversation_id: str = "", *, compared: bool = False) -> None:
        self.message = message
        self.conversation_id = conversation_id
        self.compared = compared
        self.started = False
        self.broken = False
        self.request_id = str(uuid.uuid4())


class OpenConversation:
    """One conversation at a time on a screen; `read(prompt)` asks for a choice."""

    def __init__(self, client: Client, screen: Screen, read: Callable[[str], str]) -> None:
        self.client = client
        self.screen = screen
        self.read = read
        # Empty until the first answer starts.
        self.conversation_id = ""
        # The answer that votes speak of: the latest that the conversation goes on with.
        self.response_id = ""
        self._asked = Asked()

    def new(self) -> None:
        """Leaves the conversation for one that has not begun."""
        self.conversation_id = self.response_id = ""

    def go_on(self, conversation: Conversation) -> None:
        """Opens a conversation, shows it, and asks for the choice that is still to be made."""
        self.conversation_id, self.response_id = conversation.conversation_id, ""
        self._show_turns(list(conversation.turns))

    def turns(self) -> list[Turn]:
        """All of it as the server keeps it."""
        return list(self.client.conversation(self.conversation_id).turns) if self.conversation_id else []

    def last_text(self) -> str:
        """The answer that votes speak of."""
        answers = [answer for turn in self.turns() for answer in (turn.response, turn.comparison.a, turn.comparison.b)]
        return next((answer.text for answer in answers if answer.response_id == self.response_id), "")

    def ask(self, message: str, *, compared: bool) -> None:
        """Sends a message and shows its answer, or two."""
        self._send(Asked(message, self.conversation_id, compared=compared))

    def ask_again(self) -> None:
        """Sends the last message once more."""
        asked = self._asked
        if not asked.message:
            self.screen.note("Nothing was asked yet.")
            return
        if asked.started or asked.conversation_id != self.conversation_id:
            asked = Asked(asked.message, self.conversation_id, compared=asked.compared)
        if self._asked.broken:
            # An engine that died takes a while to come back, and its server says when it is.
            self.screen.note(f"Waiting until the server answers, {RETURN_SECONDS:.0f} s at most.")
            self.client.wait_until_serving(RETURN_SECONDS)
        self.screen.say(f"> {printable(asked.message)}", "bold")
        self._send(asked)

    def _send(self, asked: Asked) -> None:
        self._asked, asked.broken = asked, False
        if asked.compared:
            self._compare_message(asked)
        else:
            self._chat_message(asked)

    def _chat_message(self, asked: Asked) -> None:
        wrap = self.screen.stream()
        heard = ""
        finished = None
        with self.client.chat(
            asked.message, conversation_id=asked.conversation_id, request_id=asked.request_id
        ) as stream:
            try:
                for event in stream:
                    match event:
                        case ChatStarted():
                            asked.started = True
                            self.conversation_id, self.response_id = event.conversation_id, event.response_id
                        case ChatDelta():
                            heard += event.text
                            wrap.feed(event.text)
                        case ChatFinished():
                            finished = event
            except KeyboardInterrupt:
                stream.cancel()
            except PrefloopError as error:
                wrap.close()
                if kept := self._fetch_again(stream, error):
                    self._show_kept(kept.response, heard)
                return
            finally:
                wrap.close()
        if finished is None:
            self.screen.note("stopped")
        else:
            self.screen.note(footer(finished.finish_reason, finished.usage.completion_tokens, finished.policy_version))

    def _compare_message(self, asked: Asked) -> None:
        answers = {SLOT_A: "", SLOT_B: ""}
        ended: dict[Slot.ValueType, CompareFinished] = {}
        broken: PrefloopError | None = None
        with (
            self.client.compare(
                asked.message, conversation_id=asked.conversation_id, request_id=asked.request_id
            ) as stream,
            Live(console=self.screen.console, refresh_per_second=8, transient=True) as live,
        ):
            try:
                for event in stream:
                    match event:
                        case CompareStarted():
                            asked.started = True
                            self.conversation_id, self.response_id = event.conversation_id, ""
                        case CompareDelta():
                            answers[event.slot] += event.text
                            live.update(self.screen.growing(answers))
                        case CompareFinished():
                            ended[event.slot] = event
            except KeyboardInterrupt:
                stream.cancel()
            except PrefloopError as error:
                broken = error
        if broken:
            if kept := self._fetch_again(stream, broken):
                self._show_turns([kept])
                self.screen.note("/retry asks again")
            return
        self.screen.answers(
            answers,
            {slot: ENDINGS.get(ended[slot].finish_reason, "") if slot in ended else "stopped" for slot in answers},
        )
        if len(ended) == len(answers):
            self._ask_choice(stream.comparison_id, ended[SLOT_A].response_id)
        else:
            self.screen.note("Stopped before both answers ended, so there is nothing to choose between.")

    def _fetch_again(self, stream: Stream[ChatEvent] | Stream[CompareEvent], error: PrefloopError) -> Turn | None:
        """What the server kept of an answer whose stream broke; None where the user stops waiting. Raises `error` where
        the answer had not started."""
        self._asked.broken = True
        if not stream.conversation_id:
            raise error
        self.screen.warn(str(error))
        self.screen.note(f"Waiting for what was kept, {RETURN_SECONDS:.0f} s at most; Ctrl-C stops waiting.")
        try:
            return self.client.refetch(stream, timeout=RETURN_SECONDS)
        except KeyboardInterrupt:
            self.screen.note("/history shows it later, /retry asks again.")
            return None

    def _show_kept(self, kept: Response, heard: str) -> None:
        """Goes on where the screen stopped, where the kept answer begins as what was heard."""
        wrap = self.screen.stream()
        wrap.feed(kept.text.removeprefix(heard))
        wrap.close()
        self.screen.note(f"{response_words(kept)} · /retry asks again")

    def _ask_choice(self, comparison_id: str, response_a: str) -> None:
        while True:
            answer = self.read("better: a, b, t (tie), x (both bad), Enter to skip> ").strip().lower()
            if not answer:
                self.response_id = response_a
                self.screen.note("Skipped: a next message goes on with A, and /up and /down are about A.")
                return
            if answer in CHOICES:
                break
        choice = CHOICES[answer]
        self.client.choose(comparison_id, choice)
        # The server says how it goes on: after a tie it draws the answer.
        comparison = next(turn.comparison for turn in self.turns() if turn.comparison.comparison_id == comparison_id)
        self.response_id = _continued(comparison)
        if comparison.continued_with:
            self.screen.note(f"{CHOICE_WORDS[choice]}; going on with {SLOT_NAMES[comparison.continued_with]}")
        else:
            self.screen.note(f"{CHOICE_WORDS[choice]}; the model forgets this turn")

    def _show_turns(self, turns: list[Turn]) -> None:
        """The last turns of the conversation; asks for the choice that is still to be made."""
        for turn in turns:
            self.screen.turn(turn)
        if not turns:
            return
        last = turns[-1]
        self.response_id = last.response.response_id if last.HasField("response") else _continued(last.comparison)
        if last.HasField("comparison") and _choosable(last.comparison):
            self._ask_choice(last.comparison.comparison_id, last.comparison.a.response_id)


def _choosable(comparison: Comparison) -> bool:
    whole = (FINISH_REASON_STOP, FINISH_REASON_LENGTH)
    both = comparison.a.finish_reason in whole and comparison.b.finish_reason in whole
    return comparison.state == COMPARISON_STATE_OPEN and both


def _continued(comparison: Comparison) -> str:
    """The response id of the answer the conversation went on with; empty without one."""
    answers = {SLOT_A: comparison.a, SLOT_B: comparison.b}
    answer = answers.get(comparison.continued_with)
    return answer.response_id if answer else ""
