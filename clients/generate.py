"""Generates client.py from async_client.py, so that the two cannot diverge: `python clients/generate.py`.

Words are replaced in the whole text, including docstrings and examples. The real differences between gRPC's two
interfaces are in calls.py and channel.py, under matching names.
"""

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "async_client.py"
OUTPUT = Path(__file__).parent / "client.py"
HEAD = "# Generated from async_client.py by `make stubs`: edit that file, not this one.\n"
# Applied in this order. async_client.py uses `asyncio` only for `sleep`.
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
    # The replacements shorten lines and reorder imports.
    for command in (["check", "--fix-only", "--unsafe-fixes"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(OUTPUT), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    OUTPUT.write_text(generate(), encoding="utf-8")
