"""The demo's progress, stored in `demo.json` in its data directory, from which the next run resumes.

The file is replaced atomically at every step, so the demo may be killed at any point. Votes are not recorded here,
since the server has them. Only one demo at a time can use a directory.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from clients.demo.plan import ROUNDS, Pace, Plan, Work
from clients.demo.processes import DemoError
from clients.demo.voter import Answer

FORMAT = 1


class FinalError(DemoError):
    """The demo in this directory cannot be resumed; the message says what to do."""


@dataclass
class Record:
    """One demo. Change it inside `with record.step():`, which writes the file; any thread may do so."""

    directory: Path
    plan: Plan
    # The measured seconds per answer, and the amount of work chosen accordingly.
    seconds_per_answer: float | None = None
    work: Work = field(default_factory=Work)
    # By index of the question.
    before: dict[int, Answer] = field(default_factory=dict)
    after: dict[int, Answer] = field(default_factory=dict)
    # Whether the held-out questions were deleted from the server, so that the learner does not train on them.
    forgotten: bool = False
    # The id of the newest comparison for each question. The server knows which have a vote.
    compared: dict[str, str] = field(default_factory=dict)
    # For each round that ended: round_id, state, sentence, policy_version, metrics.
    reports: list[dict[str, Any]] = field(default_factory=list)
    streams: int = 0
    crossing: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    def __post_init__(self) -> None:
        self._writing = threading.RLock()

    @classmethod
    @contextmanager
    def opened(cls, directory: Path, plan: Plan) -> Iterator[Self]:
        """Opens the record in a directory, or creates one in an empty directory. Raises FinalError if another demo owns
        the directory or is running in it."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "demo.lock").open("w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FinalError(f"Another demo is running in {directory}.") from None
            yield cls._read(directory, plan)

    @classmethod
    def _read(cls, directory: Path, plan: Plan) -> Self:
        path = directory / "demo.json"
        if not path.exists():
            if any(found.name != "demo.lock" for found in directory.iterdir()):
                raise FinalError(f"{directory} is not a demo directory: remove it, or pass another --data-dir.")
            record = cls(directory, plan)
            record.write()
            return record
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("format") != FORMAT:
                raise ValueError("another format")
            kept |= {"directory": directory, "plan": Plan(**kept["plan"]), "work": Work(**kept["work"])}
            for name in ("before", "after"):
                kept[name] = {int(place): Answer(**answer) for place, answer in kept[name].items()}
            record = cls(**kept)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FinalError(f"{path} cannot be read ({error}); remove {directory} to start over.") from error
        if record.plan != plan:
            raise FinalError(
                f"{directory} has a demo with {_difference(record.plan, plan)}: use its flags, remove the directory, "
                "or pass another --data-dir."
            )
        return record

    @property
    def begun(self) -> bool:
        """Whether there is progress to resume from."""
        return self.seconds_per_answer is not None

    @property
    def pace(self) -> Pace:
        """The speed of this machine; only valid after it has been measured."""
        assert self.seconds_per_answer is not None
        return Pace(self.seconds_per_answer * self.work.max_tokens / Work().max_tokens)

    @property
    def promoted(self) -> dict[str, Any] | None:
        return next((report for report in self.reports if report["state"] == "promoted"), None)

    @property
    def refused_twice(self) -> bool:
        """Whether all rounds were rejected, so that there is nothing more to try."""
        return len(self.reports) >= ROUNDS and not self.promoted

    @contextmanager
    def step(self) -> Iterator[None]:
        """Writes the block's changes to the file."""
        with self._writing:
            yield
            self.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the block's duration to a stage's seconds, even if the block fails."""
        started = time.monotonic()
        try:
            yield
        finally:
            with self.step():
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def write(self) -> None:
        kept = {name: value for name, value in asdict(self).items() if name != "directory"}
        path = self.directory / "demo.json"
        new = path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **kept}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def _difference(earlier: Plan, plan: Plan) -> str:
    was, is_now = asdict(earlier), asdict(plan)
    return ", ".join(f"{name} {was[name]} (not {is_now[name]})" for name in was if was[name] != is_now[name])
