"""Records the chat sessions of docs/chat.md: `python docs/record.py PORT`, while `server serve` listens there.

Each line is typed into `chat` under a pseudo-terminal once its prompt stands there, and all that appears replaces the
page's transcript. The terminal is a dumb one, which nothing is drawn over in; what answers say is left as it came.
"""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

PAGE = Path(__file__).with_name("chat.md")
CHAT = Path(sys.executable).parent / "chat"
COLUMNS, LINES = 100, 30
ANSWER_SECONDS = 120.0
# A prompt is one that nothing follows for so long.
QUIET_SECONDS = 0.5
SESSIONS = [
    (
        [],
        [
            "In one short sentence: what do owls eat?",
            "/up",
            "/history",
            "/compare In one short sentence: where do owls sleep?",
            "b",
            "/down not what I asked",
            "/undo",
            "/correct In hollow trees, barns and cliffs, by day.",
            "/quit",
        ],
    ),
    (["--resume"], ["/quit"]),
]


def record(arguments: list[str], lines: list[str], port: int) -> str:
    """One session as it looked, from the shell's prompt on; raises RuntimeError where no prompt comes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    shape = {"TERM": "dumb", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    whose = {"PREFLOOP_PORT": str(port), "PREFLOOP_USER": "ana"}
    chat = subprocess.Popen(
        [CHAT, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **shape, **whose}
    )
    os.close(theirs)
    seen = ""
    try:
        for line in lines:
            seen += until_prompt(ours)
            os.write(ours, line.encode() + b"\r")
        chat.wait(ANSWER_SECONDS)
        seen += read(ours)
    finally:
        chat.kill()
        chat.wait()
        os.close(ours)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.replace("\r", ""))
    return "\n".join(line.rstrip() for line in [f"$ {' '.join(['.venv/bin/chat', *arguments])}", *shown.split("\n")])


def until_prompt(terminal: int) -> str:
    """What appears up to the next prompt."""
    seen = ""
    while select.select([terminal], [], [], QUIET_SECONDS if seen.endswith("> ") else ANSWER_SECONDS)[0]:
        seen += read(terminal)
    if not seen.endswith("> "):
        raise RuntimeError(f"No prompt came after: {seen[-500:]}")
    return seen


def read(terminal: int) -> str:
    """What is there; nothing once the other end has closed."""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:
        return ""


def main() -> None:
    """Writes the transcript into the page."""
    sessions = [record(arguments, lines, int(sys.argv[1])).strip() for arguments, lines in SESSIONS]
    block = "```text\n" + "\n\n".join(sessions) + "\n```"
    text, places = re.subn(r"```text\n.*?```", lambda _: block, PAGE.read_text(), count=1, flags=re.DOTALL)
    if not places:
        raise RuntimeError("The page has no transcript to replace.")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
