import threading

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from clients.terminal.line_editor import Commands, LineEditor
from tests.clients.conftest import WAIT_SECONDS

WORDS = {"/compare": "two answers", "/correct": "a better one", "/up": "good"}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/", ["/compare", "/correct", "/up"]),
        ("/co", ["/compare", "/correct"]),
        ("/up", ["/up"]),
        ("/x", []),
        # Only at the beginning of the line, and only with a slash.
        ("/up /", []),
        ("up", []),
        ("", []),
    ],
)
def test_commands_are_completed_where_they_may_stand(typed: str, offered: list[str]) -> None:
    completions = list(Commands(WORDS).get_completions(Document(typed), CompleteEvent()))
    assert [completion.text for completion in completions] == offered
    assert all(completion.start_position == -len(typed) for completion in completions)


def test_tab_completes_a_command() -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        editor = LineEditor()
        editor.complete(WORDS)

        def enter(buffer: Buffer) -> None:
            if buffer.text == "/compare":
                keys.send_text(" fish?\r")

        editor._lines.default_buffer.on_text_changed += enter
        # Ends the line even if Tab does nothing.
        late = threading.Timer(WAIT_SECONDS, keys.send_text, ["\r"])
        late.start()
        keys.send_text("/com\t")
        assert editor.read("> ") == "/compare fish?"
        late.cancel()


def test_a_text_of_several_lines_is_edited() -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        editor = LineEditor()
        keys.send_text("!\rMice.\x1b\r")
        assert editor.edit("better> ", "Owls eat:\nvoles") == "Owls eat:\nvoles!\nMice."
