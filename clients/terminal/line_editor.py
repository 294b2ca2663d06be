"""Line editing on a terminal: history, completion of slash commands by Tab, and longer texts to change."""

from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document


class Commands(Completer):
    """The first word of a line that begins with a slash. `words` says what each is for."""

    def __init__(self, words: dict[str, str]) -> None:
        self._words = words

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/"):
            for word, meaning in self._words.items():
                if word.startswith(typed):
                    yield Completion(word, start_position=-len(typed), display_meta=meaning)


class LineEditor:
    """What a terminal chat reads from, once it is told the commands."""

    def __init__(self) -> None:
        self._lines: PromptSession[str] = PromptSession(complete_while_typing=False)
        # Of its own, so that what is edited is no line to come back to.
        self._texts: PromptSession[str] = PromptSession(multiline=True, bottom_toolbar="Esc Enter keeps it, Ctrl-C not")

    def complete(self, words: dict[str, str]) -> None:
        """Completes these commands from now on."""
        self._lines.completer = Commands(words)

    def read(self, prompt: str) -> str:
        """One line."""
        return self._lines.prompt(prompt)

    def edit(self, prompt: str, text: str) -> str:
        """The text as the user changed it, which may have many lines."""
        return self._texts.prompt(prompt, default=text)
