"""The terminal chat: messages and slash commands.

Votes, undo and history read the server's record, so two terminals of one user agree. Ctrl-C stops the current action,
never the program.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from prefloop.v1.chat_pb2 import Conversation, Turn
from prefloop.v1.feedback_pb2 import ROLE_ASSISTANT, ROLE_USER, THUMB_DOWN, THUMB_UP, Feedback, Message, Thumb
from rich.console import Console

from clients.client import Client
from clients.errors import PrefloopError
from clients.terminal.open_conversation import OpenConversation
from clients.terminal.reviews import compare_answers
from clients.terminal.screen import Screen, vote_words
from clients.text import printable

LISTED_CONVERSATIONS = 20

Edit = Callable[[str, str], str]


class Quit(Exception):
    """The user wants to leave."""


@dataclass(frozen=True)
class Command:
    """One slash command: its arguments, its description, and the method to call with the rest of the line."""

    arguments: str
    help: str
    run: Callable[[str], None]


class Terminal:
    """A chat session. `read(prompt)` returns a line from the user; EOFError from it ends the session. `edit(prompt,
    text)`, if there is an editor, returns the edited text."""

    def __init__(self, client: Client, console: Console, read: Callable[[str], str], edit: Edit | None = None) -> None:
        self.client = client
        self.screen = Screen(console)
        self.read = read
        self.edit = edit
        self.talk = OpenConversation(client, self.screen, read)
        self.comparing = False
        self._listed: list[str] = []
        # Demonstrations belong to no conversation, so they are recorded here for /undo.
        self._demonstrations: list[Feedback] = []
        self.commands = {
            "/compare": Command(
                "[MESSAGE]", "two answers to MESSAGE, or to every message until /compare", self._compare
            ),
            "/review": Command(
                "",
                "compare answers of two versions of the model, apart from your conversations",
                lambda _: compare_answers(self.client, self.screen, self.read),
            ),
            "/up": Command("[COMMENT]", "the last answer was good", lambda text: self._thumb(THUMB_UP, text)),
            "/down": Command("[COMMENT]", "the last answer was bad", lambda text: self._thumb(THUMB_DOWN, text)),
            "/correct": Command("[TEXT]", "correct the last answer; without TEXT, edit it", self._correct),
            "/demonstrate": Command("QUESTION", "give the best answer to a question yourself", self._demonstrate),
            "/undo": Command("", "retract your latest vote in this conversation", self._undo),
            "/retry": Command("", "send your last message again", lambda _: self.talk.ask_again()),
            "/history": Command("", "this conversation with its votes", self._history),
            "/conversations": Command("", "your conversations, newest first", self._conversations),
            "/open": Command("N|ID", "continue a conversation", self._open),
            "/new": Command("", "start a new conversation", self._new),
            "/delete": Command("[N|ID]", "permanently delete this conversation or another; asks first", self._delete),
            "/help": Command("", "this list", self._help),
            "/quit": Command("", "leave (Ctrl-D too)", self._quit),
        }

    def run(self, conversation: Conversation | None = None) -> None:
        """Reads lines until the user leaves, in `conversation` if one is given. A failed call prints one sentence and
        the session continues."""
        self.screen.note(f"{self.client.address} · /help lists the commands, Ctrl-C stops an answer")
        while True:
            try:
                if conversation:
                    opened, conversation = conversation, None
                    self.talk.go_on(opened)
                self._do(self.read("compare> " if self.comparing else "> ").strip())
            except PrefloopError as error:
                self.screen.warn(str(error))
            except KeyboardInterrupt:
                self.screen.note("Ctrl-D or /quit leaves.")
            except (EOFError, Quit):
                return

    def _do(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if not line:
            return
        if not line.startswith("/"):
            self.talk.ask(line, compared=self.comparing)
        elif word in self.commands:
            self.commands[word].run(rest.strip())
        else:
            self.screen.warn(f"There is no command {printable(word)}; /help lists them.")

    # Commands

    def _compare(self, message: str) -> None:
        if message:
            self.talk.ask(message, compared=True)
            return
        self.comparing = not self.comparing
        self.screen.note("Every message now gets two answers." if self.comparing else "Back to one answer.")

    def _thumb(self, thumb: Thumb.ValueType, comment: str) -> None:
        if self._has_answer():
            self.client.thumb(self.talk.response_id, thumb, comment=comment)
            self.screen.note("thumb up, saved" if thumb == THUMB_UP else "thumb down, saved")

    def _correct(self, text: str) -> None:
        if not self._has_answer():
            return
        if not text and self.edit is None:
            self.screen.warn("Write the better answer after /correct.")
            return
        if not text:
            text = self._edited("better> ", self.talk.last_text())
        if text:
            self.client.correct(self.talk.response_id, text)
            self.screen.note("correction saved")

    def _demonstrate(self, question: str) -> None:
        if not question:
            self.screen.warn("Write a question after /demonstrate; you will be asked for its best answer.")
            return
        answer = self._edited("best answer> ", "") if self.edit else self.read("best answer> ").strip()
        if answer:
            messages = [Message(role=ROLE_USER, content=question), Message(role=ROLE_ASSISTANT, content=answer)]
            self._demonstrations.append(self.client.demonstrate(messages))
            self.screen.note("saved; /undo retracts it")

    def _edited(self, prompt: str, text: str) -> str:
        """The edited text; empty if the user did not change it."""
        assert self.edit
        try:
            changed = self.edit(prompt, text).strip()
        except (EOFError, KeyboardInterrupt):
            changed = ""
        if changed in ("", text.strip()):
            self.screen.note("Nothing was changed, so nothing was sent.")
            return ""
        return changed

    def _undo(self, _: str) -> None:
        votes = [vote for turn in self.talk.turns() for vote in _votes(turn)] + self._demonstrations
        if not votes:
            self.screen.note("You have no votes in this conversation to retract.")
            return
        latest = max(votes, key=lambda vote: vote.create_time.ToNanoseconds())
        self.client.retract(latest.feedback_id)
        self._demonstrations = [vote for vote in self._demonstrations if vote.feedback_id != latest.feedback_id]
        self.screen.note(f"retracted: {vote_words(latest)}")

    def _history(self, _: str) -> None:
        turns = self.talk.turns()
        if not turns:
            self.screen.note("This conversation is empty.")
        for turn in turns:
            self.screen.turn(turn)

    def _conversations(self, _: str) -> None:
        found = list(itertools.islice(self.client.conversations(), LISTED_CONVERSATIONS))
        if not found:
            self.screen.note("No conversations yet.")
            return
        self._listed = [conversation.conversation_id for conversation in found]
        self.screen.conversations(found, self.talk.conversation_id)

    def _open(self, name: str) -> None:
        if not name:
            self.screen.warn("Write a number from /conversations or a conversation's id after /open.")
            return
        self.talk.go_on(self.client.conversation(self._named(name)))

    def _new(self, _: str) -> None:
        self.talk.new()
        self.screen.note("new conversation")

    def _delete(self, name: str) -> None:
        conversation_id = self._named(name) if name else self.talk.conversation_id
        if not conversation_id:
            self.screen.note("This conversation is empty.")
            return
        title = printable(self.client.conversation(conversation_id).title).replace("\n", " ")
        if self.read(f"Permanently delete “{title}” and its votes? y, or Enter to keep it> ").strip().lower() != "y":
            self.screen.note("not deleted")
            return
        self.client.delete_conversation(conversation_id)
        self.screen.note("deleted")
        # The listed numbers are no longer valid.
        self._listed = []
        if conversation_id == self.talk.conversation_id:
            self._new("")

    def _help(self, _: str) -> None:
        self.screen.help(
            (f"{word} {command.arguments}".strip(), command.help) for word, command in self.commands.items()
        )

    def _quit(self, _: str) -> None:
        raise Quit

    def _named(self, name: str) -> str:
        """The id of a conversation given by its number in the list or by its id."""
        listed = name.isdecimal() and 1 <= int(name) <= len(self._listed)
        return self._listed[int(name) - 1] if listed else name

    def _has_answer(self) -> bool:
        if not self.talk.response_id:
            self.screen.warn("There is no answer here to vote on.")
        return bool(self.talk.response_id)


def _votes(turn: Turn) -> list[Feedback]:
    """The user's current votes on a turn: the choice, and each answer's thumbs and corrections."""
    if turn.HasField("response"):
        return list(turn.response.feedback)
    choice = [turn.comparison.feedback] if turn.comparison.HasField("feedback") else []
    return [*choice, *turn.comparison.a.feedback, *turn.comparison.b.feedback]
