"""Output of the terminal chat: answers as they arrive, turns as the server stores them, and votes in words."""

from collections.abc import Iterable, Mapping

from prefloop.v1.chat_pb2 import (
    COMPARISON_STATE_OPEN,
    COMPARISON_STATE_SKIPPED,
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    SLOT_A,
    SLOT_B,
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
    FEEDBACK_KIND_DEMONSTRATION,
    THUMB_UP,
    Feedback,
)
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from clients.text import WordWrap, printable

SIDE_BY_SIDE_COLUMNS = 100
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
    FINISH_REASON_ERROR: "cut off by an error",
}


class Screen:
    """Writes to a console. Control characters are removed from all text of the model and the user."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style))

    def note(self, text: str) -> None:
        self.say(text, "dim")

    def warn(self, text: str) -> None:
        self.say(text, "red")

    def stream(self) -> WordWrap:
        """A writer for an answer that arrives piece by piece."""
        # soft_wrap: WordWrap has already broken the lines.
        return WordWrap(lambda text: self.console.print(Text(text), end="", soft_wrap=True), self.console.width)

    def growing(self, answers: Mapping[Slot.ValueType, str]) -> RenderableType:
        """Both answers while they stream: the last lines that fit on the screen."""
        wide = self.console.width >= SIDE_BY_SIDE_COLUMNS
        width = self.console.width // (2 if wide else 1) - 4
        lines = max(3, self.console.height // (1 if wide else 2) - 3)
        texts = {slot: Text(printable(text)) for slot, text in answers.items()}
        return self._two(
            {slot: Text("\n").join(text.wrap(self.console, width)[-lines:]) for slot, text in texts.items()}
        )

    def answers(self, answers: Mapping[Slot.ValueType, str], subtitles: Mapping[Slot.ValueType, str]) -> None:
        self.console.print(self._two({slot: Text(printable(text)) for slot, text in answers.items()}, subtitles))

    def _two(
        self, texts: Mapping[Slot.ValueType, Text], subtitles: Mapping[Slot.ValueType, str] | None = None
    ) -> RenderableType:
        panels = [
            Panel(text, title=SLOT_NAMES[slot], subtitle=(subtitles or {}).get(slot) or None, border_style="dim")
            for slot, text in texts.items()
        ]
        if self.console.width < SIDE_BY_SIDE_COLUMNS:
            return Group(*panels)
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        grid.add_row(*panels)
        return grid

    def turn(self, turn: Turn) -> None:
        """A message, its answer or answers, and their votes."""
        if turn.message:
            self.say(f"> {printable(turn.message)}", "bold")
        if turn.HasField("response"):
            self.console.print(Text(printable(turn.response.text)))
            self.note(response_words(turn.response))
        elif turn.HasField("given_answer"):
            self.console.print(Text(printable(turn.given_answer)))
        elif turn.HasField("comparison"):
            comparison = turn.comparison
            answers = {SLOT_A: comparison.a, SLOT_B: comparison.b}
            self.answers(
                {slot: answer.text for slot, answer in answers.items()},
                {slot: ENDINGS.get(answer.finish_reason, "") for slot, answer in answers.items()},
            )
            votes = [f"{SLOT_NAMES[slot]}: {vote_words(vote)}" for slot in answers for vote in answers[slot].feedback]
            self.note(" · ".join([comparison_words(comparison), *votes]))

    def conversations(self, conversations: Iterable[Conversation], here: str) -> None:
        """A numbered list; `here` is the id of the open conversation."""
        table = Table(box=None, pad_edge=False)
        table.add_column("N", justify="right")
        table.add_column("last used", no_wrap=True)
        table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=1)
        for number, conversation in enumerate(conversations, start=1):
            used = conversation.update_time.ToDatetime().strftime("%Y-%m-%d %H:%M")
            mark = " (this one)" if conversation.conversation_id == here else ""
            table.add_row(str(number), used, Text(printable(conversation.title).replace("\n", " ") + mark))
        self.console.print(table)
        self.note("times are UTC; /open N continues a conversation")

    def help(self, rows: Iterable[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        for command, does in rows:
            table.add_row(Text(command), does)
        self.console.print(table)


def footer(reason: FinishReason.ValueType, tokens: int, version: str) -> str:
    """The line below an answer: version, number of tokens, and how it ended if cut short."""
    return " · ".join(filter(None, [version, f"{tokens} tokens", ENDINGS.get(reason, "")]))


def response_words(response: Response) -> str:
    """The versions that made an answer, how it ended, and the votes on it."""
    versions = " -> ".join(dict.fromkeys(span.policy_version for span in response.spans))
    words = [footer(response.finish_reason, response.usage.completion_tokens, versions)]
    return " · ".join(words + [vote_words(vote) for vote in response.feedback])


def vote_words(vote: Feedback) -> str:
    if vote.kind == FEEDBACK_KIND_CHOICE:
        words = CHOICE_WORDS.get(vote.choice, "a choice")
    elif vote.kind == FEEDBACK_KIND_CORRECTION:
        words = f"corrected to: {printable(vote.correction)}"
    elif vote.kind == FEEDBACK_KIND_DEMONSTRATION:
        words = f"demonstration: {printable(vote.demonstration.messages[0].content)}"
    else:
        words = "thumb up" if vote.thumb == THUMB_UP else "thumb down"
    return f"{words} ({printable(vote.comment)})" if vote.comment else words


def comparison_words(comparison: Comparison) -> str:
    """The choice, and the answer that the conversation continued with."""
    if comparison.state == COMPARISON_STATE_OPEN:
        return "no choice yet"
    if comparison.state == COMPARISON_STATE_SKIPPED:
        return f"no choice made; continued with {SLOT_NAMES.get(comparison.continued_with, 'A')}"
    words = vote_words(comparison.feedback) if comparison.HasField("feedback") else "choice retracted"
    slot = SLOT_NAMES.get(comparison.continued_with)
    return f"{words}; continued with {slot}" if slot else f"{words}; hidden from the model"
