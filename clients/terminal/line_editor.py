"""Line editing on a terminal: history, Tab completion of slash commands, and editing of longer texts."""

from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document


class Commands(Completer):
    """Completes a slash command at the start of a line. `words` maps each command to its description."""

    def __init__(self, words: dict[str, str]) -> None:
        self._words = words

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/"):
            for word, meaning in self._words.items():
                if word.startswith(typed):
                    yield Completion(word, start_position=-len(typed), display_meta=meaning)


class LineEditor:
    """Reads the lines of a terminal chat; `complete` sets the commands for completion."""

    def __init__(self) -> None:
        self._lines: PromptSession[str] = PromptSession(complete_while_typing=False)
        # A separate session, so that edited texts stay out of the line history.
        self._texts: PromptSession[str] = PromptSession(multiline=True, bottom_toolbar="Esc Enter saves, Ctrl-C aborts")

    def complete(self, words: dict[str, str]) -> None:
        """Completes these commands from now on."""
        self._lines.completer = Commands(words)

    def read(self, prompt: str) -> str:
        return self._lines.prompt(prompt)

    def edit(self, prompt: str, text: str) -> str:
        """Lets the user edit a text of any number of lines."""
        return self._texts.prompt(prompt, default=text)
