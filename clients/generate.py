"""Makes client.py from async_client.py: `python clients/generate.py`. One is written by hand, so the two cannot differ.

Words are replaced in the whole text, docstrings and examples included. What really differs between gRPC's two
interfaces is in calls.py and channel.py, under names that differ in a word.
"""

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "async_client.py"
OUTPUT = Path(__file__).parent / "client.py"
HEAD = "# Made from async_client.py by `make stubs`: write there, not here.\n"
# In this order. `asyncio` is imported for its sleep alone.
WORDS = {
    r"^import asyncio\n": "",
    r"\basyncio\.sleep\b": "time.sleep",
    r"\bgrpc\.aio\b": "grpc",
    r"\basync ": "",
    r"\bawait ": "",
    r"\bAsync(Client|Iterator|Pauses|Stream|StreamingCall)\b": r"\1",
    r"\basync_reply\b": "reply",
    r"\bopen_async_channel\b": "open_channel",
    r"\b__a(enter|exit)__\b": r"__\1__",
    r"\btasks\b": "threads",
}


def generate() -> str:
    """The text of client.py."""
    text = HEAD + SOURCE.read_text(encoding="utf-8")
    for pattern, replacement in WORDS.items():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    # Shorter words leave shorter lines and imports out of order.
    for command in (["check", "--fix-only", "--unsafe-fixes"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(OUTPUT), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    OUTPUT.write_text(generate(), encoding="utf-8")
