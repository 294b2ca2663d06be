"""The open conversation in a terminal: messages, their answers, and the choice between two answers.

If a stream breaks, the stored answer is fetched once the server is back; the message is never sent again automatically.
Ctrl-C stops the answer that is being streamed.
"""

import uuid
from collections.abc import Callable

from prefloop.v1.chat_pb2 import (
    COMPARISON_STATE_OPEN,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_STOP_SEQUENCE,
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

# A crashed engine is back within a minute or two.
RETURN_SECONDS = 180.0
CHOICES: dict[str, Choice.ValueType] = {"a": CHOICE_A, "b": CHOICE_B, "t": CHOICE_TIE, "x": CHOICE_BOTH_BAD}


class Asked:
    """A message, and whether it asks for two answers. Its request id makes the server answer it once, however often it
    is sent. After the answer has `started`, asking again is a new request."""

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
        # The answer that votes refer to: the latest one that the conversation continues with.
        self.response_id = ""
        self._asked = Asked()

    def new(self) -> None:
        """Leaves the conversation; the next message starts a new one."""
        self.conversation_id = self.response_id = ""

    def go_on(self, conversation: Conversation) -> None:
        """Opens a conversation, shows it, and asks for a choice that is still open."""
        self.conversation_id, self.response_id = conversation.conversation_id, ""
        self._show_turns(list(conversation.turns))

    def turns(self) -> list[Turn]:
        """All turns as the server stores them."""
        return list(self.client.conversation(self.conversation_id).turns) if self.conversation_id else []

    def last_text(self) -> str:
        """The text of the answer that votes refer to."""
        answers = [answer for turn in self.turns() for answer in (turn.response, turn.comparison.a, turn.comparison.b)]
        return next((answer.text for answer in answers if answer.response_id == self.response_id), "")

    def ask(self, message: str, *, compared: bool) -> None:
        """Sends a message and shows its answer or answers."""
        self._send(Asked(message, self.conversation_id, compared=compared))

    def ask_again(self) -> None:
        """Sends the last message again."""
        asked = self._asked
        if not asked.message:
            self.screen.note("No message was sent yet.")
            return
        if asked.started or asked.conversation_id != self.conversation_id:
            asked = Asked(asked.message, self.conversation_id, compared=asked.compared)
        if self._asked.broken:
            # A crashed engine takes a while to come back; the server's health check reports when it has.
            self.screen.note(f"Waiting up to {RETURN_SECONDS:.0f} s for the server.")
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
            self.screen.note("Stopped before both answers ended, so there is no choice to make.")

    def _fetch_again(self, stream: Stream[ChatEvent] | Stream[CompareEvent], error: PrefloopError) -> Turn | None:
        """The stored turn of an answer whose stream broke; None if the user stops waiting. Raises `error` if the answer
        had not started."""
        self._asked.broken = True
        if not stream.conversation_id:
            raise error
        self.screen.warn(str(error))
        self.screen.note(f"Waiting up to {RETURN_SECONDS:.0f} s for the stored answer; Ctrl-C stops waiting.")
        try:
            return self.client.refetch(stream, timeout=RETURN_SECONDS)
        except KeyboardInterrupt:
            self.screen.note("/history shows it later, /retry asks again.")
            return None

    def _show_kept(self, kept: Response, heard: str) -> None:
        """Shows the rest of the stored answer if it begins with the text shown so far, otherwise all of it."""
        wrap = self.screen.stream()
        wrap.feed(kept.text.removeprefix(heard))
        wrap.close()
        self.screen.note(f"{response_words(kept)} · /retry asks again")

    def _ask_choice(self, comparison_id: str, response_a: str) -> None:
        while True:
            answer = self.read("better: a, b, t (tie), x (both bad), Enter to skip> ").strip().lower()
            if not answer:
                self.response_id = response_a
                self.screen.note("Skipped: the next message continues with A, and /up and /down refer to A.")
                return
            if answer in CHOICES:
                break
        choice = CHOICES[answer]
        self.client.choose(comparison_id, choice)
        # The server decides which answer continues the conversation: after a tie it draws one.
        comparison = next(turn.comparison for turn in self.turns() if turn.comparison.comparison_id == comparison_id)
        self.response_id = _continued(comparison)
        if comparison.continued_with:
            self.screen.note(f"{CHOICE_WORDS[choice]}; continuing with {SLOT_NAMES[comparison.continued_with]}")
        else:
            self.screen.note(f"{CHOICE_WORDS[choice]}; the model will not see this turn again")

    def _show_turns(self, turns: list[Turn]) -> None:
        """Shows the last turns of the conversation and asks for a choice that is still open."""
        for turn in turns:
            self.screen.turn(turn)
        if not turns:
            return
        last = turns[-1]
        self.response_id = last.response.response_id if last.HasField("response") else _continued(last.comparison)
        if last.HasField("comparison") and _choosable(last.comparison):
            self._ask_choice(last.comparison.comparison_id, last.comparison.a.response_id)


def _choosable(comparison: Comparison) -> bool:
    whole = (FINISH_REASON_STOP, FINISH_REASON_STOP_SEQUENCE, FINISH_REASON_LENGTH)
    both = comparison.a.finish_reason in whole and comparison.b.finish_reason in whole
    return comparison.state == COMPARISON_STATE_OPEN and both


def _continued(comparison: Comparison) -> str:
    """The response id of the answer that the conversation continued with; empty without one."""
    answers = {SLOT_A: comparison.a, SLOT_B: comparison.b}
    answer = answers.get(comparison.continued_with)
    return answer.response_id if answer else ""
