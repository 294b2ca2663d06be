"""An operator's checks: prompts whose answers must or must not match patterns, and a command that scores answers.

A file of checks has one JSON object per line: `prompt` (or `messages`, a conversation up to its next answer), `must`
and `must_not`, lists of regular expressions to search for in the answer, and a `name` that may be left out. The command
reads one JSON object per line, `name`, `prompt` and `answer`, and prints a number last; higher is better.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
# How much of what a command printed goes into a sentence about it.
SAID = 300
# Not the command's business.
JUDGES_KEY = "PREFLOOP_JUDGE__API_KEY"


class CheckError(Exception):
    """A file of checks, or the command, is of no use; the message is a sentence."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Check(BaseModel):
    """A conversation, and what the answer to it must match and must not match."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    must: tuple[Pattern, ...] = ()
    must_not: tuple[Pattern, ...] = ()

    @model_validator(mode="after")
    def _one_question(self) -> "Check":
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("give either `prompt` or `messages`")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("the last of the `messages` must be the user's")
        return self

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Its messages, as a chat template reads them."""
        return [one.model_dump() for one in self.messages] or [{"role": "user", "content": self.prompt}]

    def broken_by(self, answer: str) -> list[str]:
        """What is wrong with the answer, as clauses."""
        lacks = [f"has nothing like {pattern!r}" for pattern in self.must if not re.search(pattern, answer)]
        has = [f"has {found[0]!r}" for pattern in self.must_not if (found := re.search(pattern, answer))]
        return lacks + has


def read_checks(file: Path) -> list[Check]:
    """The checks in a file, each with a name. Raises CheckError or OSError."""
    checks = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            check = Check.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckError(f"{str(file)!r}, line {number}: {f'{where}: ' if where else ''}{first['msg']}") from error
        checks.append(check.model_copy(update={"name": check.name or f"line {number}"}))
    if not checks:
        raise CheckError(f"{str(file)!r} has no checks")
    return checks


@dataclass(frozen=True)
class CheckedAnswer:
    """An answer to a check's prompt, as the command reads it."""

    name: str
    prompt: str
    answer: str


def score_by(command: str, answers: list[CheckedAnswer], timeout: float) -> float:
    """The number that the command prints last for these answers. Raises CheckError."""
    lines = "".join(json.dumps(vars(answer), ensure_ascii=False) + "\n" for answer in answers)
    try:
        status, said, complained = run(shlex.split(command), lines, timeout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CheckError(f"{command!r} failed: {error}") from error
    if status:
        raise CheckError(f"{command!r} exited with {status}: {complained.strip()[-SAID:]}")
    last = (said.split() or [""])[-1]
    try:
        score = float(last)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise CheckError(f"{command!r} printed {last[:SAID]!r} last, which is not a number")
    return score


def run(command: list[str], read: str, timeout: float) -> tuple[int, str, str]:
    """Runs a command that reads a text; its exit status and what it printed, on both outputs. Whatever it started ends
    with it if it takes too long. Raises OSError, ValueError and TimeoutExpired."""
    environment = {name: value for name, value in os.environ.items() if name != JUDGES_KEY}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, complained = process.communicate(read, timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, said, complained
