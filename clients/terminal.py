"""The terminal chat: one conversation at a time, its commands, and comparisons side by side.

What is shown comes from the stream while it runs and from the server's record afterwards: votes, undo and history ask
the server, so two terminals of one user agree. Ctrl-C stops the answer that is being streamed, never the program.
"""

from collections.abc import Callable
from dataclasses import dataclass

from prefloop.v1.chat_pb2 import (
    COMPARISON_STATE_OPEN,
    COMPARISON_STATE_SKIPPED,
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
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
    FinishReason,
    Response,
    Slot,
    Turn,
)
from prefloop.v1.feedback_pb2 import (
    CHOICE_A,
    CHOICE_B,
    CHOICE_BOTH_BAD,
    CHOICE_TIE,
    FEEDBACK_KIND_CHOICE,
    FEEDBACK_KIND_CORRECTION,
    THUMB_DOWN,
    THUMB_UP,
    Choice,
    Feedback,
    Thumb,
)
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from clients.client import Client
from clients.errors import PrefloopError
from clients.text import WordWrap, printable

SIDE_BY_SIDE_COLUMNS = 100
LISTED_CONVERSATIONS = 20
CHOICES: dict[str, Choice.ValueType] = {"a": CHOICE_A, "b": CHOICE_B, "t": CHOICE_TIE, "x": CHOICE_BOTH_BAD}
CHOICE_WORDS = {
    CHOICE_A: "A is better",
    CHOICE_B: "B is better",
    CHOICE_TIE: "equally good",
    CHOICE_BOTH_BAD: "both bad",
}
SLOT_NAMES = {SLOT_A: "A", SLOT_B: "B"}
ENDINGS = {
    FINISH_REASON_LENGTH: "cut at the length limit",
    FINISH_REASON_CANCELLED: "stopped",
    FINISH_REASON_ERROR: "broken off by an error",
}


class Quit(Exception):
    """The user wants to leave."""


@dataclass(frozen=True)
class Command:
    """One slash command: what follows it, what it does, and the method that does it with the rest of the line."""

    arguments: str
    help: str
    run: Callable[[str], None]


class Terminal:
    """A chat session. `read(prompt)` returns a line of the user's; EOFError from it ends the session."""

    def __init__(self, client: Client, console: Console, read: Callable[[str], str]) -> None:
        self.client = client
        self.console = console
        self.read = read
        self.conversation_id = ""
        # The answer that /up, /down and /correct speak of: the latest that the conversation goes on with.
        self.response_id = ""
        self.comparing = False
        self._listed: list[str] = []
        self.commands = {
            "/compare": Command(
                "[MESSAGE]", "two answers to MESSAGE, or to every message until /compare", self._compare
            ),
            "/up": Command("[COMMENT]", "the last answer was good", lambda text: self._thumb(THUMB_UP, text)),
            "/down": Command("[COMMENT]", "the last answer was bad", lambda text: self._thumb(THUMB_DOWN, text)),
            "/correct": Command("TEXT", "what the last answer should have been", self._correct),
            "/undo": Command("", "take back your latest vote in this conversation", self._undo),
            "/history": Command("", "this conversation with its votes", self._history),
            "/conversations": Command("", "your conversations, newest first", self._conversations),
            "/open": Command("N|ID", "go on with a conversation", self._open),
            "/new": Command("", "start a new conversation", self._new),
            "/help": Command("", "this list", self._help),
            "/quit": Command("", "leave (Ctrl-D too)", self._quit),
        }

    def run(self) -> None:
        """Reads lines until the user leaves. A failed call is told in one sentence and the session goes on."""
        self._note(f"{self.client.address} · /help lists the commands, Ctrl-C stops an answer")
        while True:
            try:
                self._do(self.read("compare> " if self.comparing else "> ").strip())
            except PrefloopError as error:
                self._say(str(error), "red")
            except KeyboardInterrupt:
                self._note("Ctrl-D or /quit leaves.")
            except (EOFError, Quit):
                return

    def _do(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if not line:
            return
        if not line.startswith("/"):
            (self._compare_message if self.comparing else self._chat_message)(line)
        elif word in self.commands:
            self.commands[word].run(rest.strip())
        else:
            self._say(f"There is no command {printable(word)}; /help lists them.", "red")

    # Answers

    def _chat_message(self, message: str) -> None:
        wrap = WordWrap(self._write, self.console.width)
        finished = None
        with self.client.chat(message, conversation_id=self.conversation_id) as stream:
            try:
                for event in stream:
                    match event:
                        case ChatStarted():
                            self.conversation_id, self.response_id = event.conversation_id, event.response_id
                        case ChatDelta():
                            wrap.feed(event.text)
                        case ChatFinished():
                            finished = event
            except KeyboardInterrupt:
                stream.cancel()
            finally:
                wrap.close()
        if finished is None:
            self._note("stopped")
        else:
            self._note(_footer(finished.finish_reason, finished.usage.completion_tokens, finished.policy_version))

    def _compare_message(self, message: str) -> None:
        answers = {SLOT_A: "", SLOT_B: ""}
        comparison_id = ""
        ended: dict[Slot.ValueType, CompareFinished] = {}
        with (
            self.client.compare(message, conversation_id=self.conversation_id) as stream,
            Live(console=self.console, refresh_per_second=8, transient=True) as live,
        ):
            try:
                for event in stream:
                    match event:
                        case CompareStarted():
                            self.conversation_id, comparison_id = event.conversation_id, event.comparison_id
                            self.response_id = ""
                        case CompareDelta():
                            answers[event.slot] += printable(event.text)
                            live.update(self._growing(answers))
                        case CompareFinished():
                            ended[event.slot] = event
            except KeyboardInterrupt:
                stream.cancel()
        subtitles = {
            slot: ENDINGS.get(ended[slot].finish_reason, "") if slot in ended else "stopped" for slot in answers
        }
        self.console.print(self._two({slot: Text(text) for slot, text in answers.items()}, subtitles))
        if len(ended) == len(answers):
            self._ask_choice(comparison_id, ended[SLOT_A].response_id)
        else:
            self._note("Stopped before both answers ended, so there is nothing to choose between.")

    def _growing(self, answers: dict[Slot.ValueType, str]) -> RenderableType:
        """Both answers while they stream: the last lines that fit on the screen."""
        wide = self.console.width >= SIDE_BY_SIDE_COLUMNS
        width = self.console.width // (2 if wide else 1) - 4
        lines = max(3, self.console.height // (1 if wide else 2) - 3)
        tails = {slot: Text("\n").join(Text(text).wrap(self.console, width)[-lines:]) for slot, text in answers.items()}
        return self._two(tails, {})

    def _two(self, texts: dict[Slot.ValueType, Text], subtitles: dict[Slot.ValueType, str]) -> RenderableType:
        panels = [
            Panel(text, title=SLOT_NAMES[slot], subtitle=subtitles.get(slot) or None, border_style="dim")
            for slot, text in texts.items()
        ]
        if self.console.width < SIDE_BY_SIDE_COLUMNS:
            return Group(*panels)
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(*panels)
        return grid

    def _ask_choice(self, comparison_id: str, response_a: str) -> None:
        while True:
            answer = self.read("better: a, b, t (tie), x (both bad), Enter to skip> ").strip().lower()
            if not answer:
                self.response_id = response_a
                self._note("Skipped: a next message goes on with A, and /up and /down are about A.")
                return
            if answer in CHOICES:
                break
        choice = CHOICES[answer]
        self.client.choose(comparison_id, choice)
        # The server says how it goes on: after a tie it draws the answer.
        comparison = next(
            turn.comparison
            for turn in self.client.conversation(self.conversation_id).turns
            if turn.comparison.comparison_id == comparison_id
        )
        self.response_id = _continued(comparison)
        if comparison.continued_with:
            self._note(f"{CHOICE_WORDS[choice]}; going on with {SLOT_NAMES[comparison.continued_with]}")
        else:
            self._note(f"{CHOICE_WORDS[choice]}; the model forgets this turn")

    # Commands

    def _compare(self, message: str) -> None:
        if message:
            self._compare_message(message)
            return
        self.comparing = not self.comparing
        self._note("Every message gets two answers now." if self.comparing else "Back to one answer.")

    def _thumb(self, thumb: Thumb.ValueType, comment: str) -> None:
        if self._has_answer():
            self.client.thumb(self.response_id, thumb, comment=comment)
            self._note("thumb up, kept" if thumb == THUMB_UP else "thumb down, kept")

    def _correct(self, text: str) -> None:
        if not text:
            self._say("Write the better answer after /correct.", "red")
            return
        if self._has_answer():
            self.client.correct(self.response_id, text)
            self._note("correction kept")

    def _undo(self, _: str) -> None:
        votes = [vote for turn in self._turns() for vote in _votes(turn)]
        if not votes:
            self._note("No vote of yours in this conversation to take back.")
            return
        latest = max(votes, key=lambda vote: vote.create_time.ToNanoseconds())
        self.client.retract(latest.feedback_id)
        self._note(f"taken back: {_vote_words(latest)}")

    def _history(self, _: str) -> None:
        turns = self._turns()
        if not turns:
            self._note("Nothing said yet in this conversation.")
            return
        for turn in turns:
            self._show_turn(turn)

    def _conversations(self, _: str) -> None:
        found: list[Conversation] = []
        for conversation in self.client.conversations():
            found.append(conversation)
            if len(found) == LISTED_CONVERSATIONS:
                break
        if not found:
            self._note("No conversations yet.")
            return
        self._listed = [conversation.conversation_id for conversation in found]
        table = Table(box=None, pad_edge=False)
        table.add_column("N", justify="right")
        table.add_column("last used", no_wrap=True)
        table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=1)
        for number, conversation in enumerate(found, start=1):
            used = conversation.update_time.ToDatetime().strftime("%Y-%m-%d %H:%M")
            here = " (this one)" if conversation.conversation_id == self.conversation_id else ""
            table.add_row(str(number), used, Text(printable(conversation.title).replace("\n", " ") + here))
        self.console.print(table)
        self._note("times are UTC; /open N goes on with one")

    def _open(self, name: str) -> None:
        if not name:
            self._say("Give a number from /conversations or a conversation's id after /open.", "red")
            return
        listed = name.isdecimal() and 1 <= int(name) <= len(self._listed)
        conversation = self.client.conversation(self._listed[int(name) - 1] if listed else name)
        self.conversation_id = conversation.conversation_id
        self.response_id = _last_response(conversation)
        for turn in conversation.turns:
            self._show_turn(turn)
        if conversation.turns and conversation.turns[-1].comparison.state == COMPARISON_STATE_OPEN:
            comparison = conversation.turns[-1].comparison
            self._ask_choice(comparison.comparison_id, comparison.a.response_id)

    def _new(self, _: str) -> None:
        self.conversation_id = self.response_id = ""
        self._note("a new conversation")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for word, command in self.commands.items():
            table.add_row(Text(f"{word} {command.arguments}".strip()), command.help)
        self.console.print(table)

    def _quit(self, _: str) -> None:
        raise Quit

    # Showing

    def _turns(self) -> list[Turn]:
        return list(self.client.conversation(self.conversation_id).turns) if self.conversation_id else []

    def _has_answer(self) -> bool:
        if not self.response_id:
            self._say("There is no answer here to vote on.", "red")
        return bool(self.response_id)

    def _show_turn(self, turn: Turn) -> None:
        self._say(f"> {printable(turn.message)}", "bold")
        if turn.HasField("response"):
            self.console.print(Text(printable(turn.response.text)))
            self._note_answer(turn.response)
        elif turn.HasField("comparison"):
            comparison = turn.comparison
            texts = {SLOT_A: Text(printable(comparison.a.text)), SLOT_B: Text(printable(comparison.b.text))}
            self.console.print(self._two(texts, {}))
            self._note(_comparison_words(comparison))

    def _note_answer(self, response: Response) -> None:
        versions = " -> ".join(dict.fromkeys(span.policy_version for span in response.spans))
        words = [_footer(response.finish_reason, response.usage.completion_tokens, versions)]
        self._note(" · ".join(words + [_vote_words(vote) for vote in response.feedback]))

    def _write(self, text: str) -> None:
        # soft_wrap: WordWrap has broken the lines already.
        self.console.print(Text(text), end="", soft_wrap=True)

    def _say(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style))

    def _note(self, text: str) -> None:
        self._say(text, "dim")


def _footer(reason: FinishReason.ValueType, tokens: int, version: str) -> str:
    return " · ".join(filter(None, [version, f"{tokens} tokens", ENDINGS.get(reason, "")]))


def _vote_words(vote: Feedback) -> str:
    if vote.kind == FEEDBACK_KIND_CHOICE:
        words = CHOICE_WORDS.get(vote.choice, "a choice")
    elif vote.kind == FEEDBACK_KIND_CORRECTION:
        words = f"corrected to: {printable(vote.correction)}"
    else:
        words = "thumb up" if vote.thumb == THUMB_UP else "thumb down"
    return f"{words} ({printable(vote.comment)})" if vote.comment else words


def _comparison_words(comparison: Comparison) -> str:
    if comparison.state == COMPARISON_STATE_OPEN:
        return "no choice yet"
    if comparison.state == COMPARISON_STATE_SKIPPED:
        return "no choice made; went on with A"
    words = _vote_words(comparison.feedback) if comparison.HasField("feedback") else "choice taken back"
    slot = SLOT_NAMES.get(comparison.continued_with)
    return f"{words}; went on with {slot}" if slot else f"{words}; forgotten by the model"


def _votes(turn: Turn) -> list[Feedback]:
    """The user's current votes on a turn: the choice, and thumbs and corrections of each answer."""
    if turn.HasField("response"):
        return list(turn.response.feedback)
    choice = [turn.comparison.feedback] if turn.comparison.HasField("feedback") else []
    return [*choice, *turn.comparison.a.feedback, *turn.comparison.b.feedback]


def _continued(comparison: Comparison) -> str:
    """The response id of the answer the conversation went on with; empty without one."""
    answers = {SLOT_A: comparison.a, SLOT_B: comparison.b}
    answer = answers.get(comparison.continued_with)
    return answer.response_id if answer else ""


def _last_response(conversation: Conversation) -> str:
    """The response id that a vote on "the last answer" means; empty without one."""
    if not conversation.turns:
        return ""
    last = conversation.turns[-1]
    return last.response.response_id if last.HasField("response") else _continued(last.comparison)
