"""What the demo has done by now, in `demo.json` in its data directory: where the next run goes on.

The file is replaced whole at every step, so a demo may be killed anywhere. Which comparisons have a vote is not in it,
since the server knows. One demo at a time has a directory.
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
    """There is nothing to go on from in this directory; the message says what to do."""


@dataclass
class Record:
    """One demo. Change it inside `with record.step():`, which writes it, on any thread."""

    directory: Path
    plan: Plan
    # The seconds that one of the first answers took, and what this machine is asked for since.
    seconds_per_answer: float | None = None
    work: Work = field(default_factory=Work)
    # By the place of the question.
    before: dict[int, Answer] = field(default_factory=dict)
    after: dict[int, Answer] = field(default_factory=dict)
    # The questions before are out of the server's history, so that the learner does not practise on them.
    forgotten: bool = False
    # The newest comparison on each question; the server knows which have a vote.
    compared: dict[str, str] = field(default_factory=dict)
    # Of each round that ended: round_id, state, sentence, policy_version, metrics.
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
        """The record in a directory, or a new one in an empty directory. Raises FinalError where another demo has it,
        or is running in it."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "demo.lock").open("w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FinalError(f"Another demo runs in {directory}.") from None
            yield cls._read(directory, plan)

    @classmethod
    def _read(cls, directory: Path, plan: Plan) -> Self:
        path = directory / "demo.json"
        if not path.exists():
            if any(found.name != "demo.lock" for found in directory.iterdir()):
                raise FinalError(f"{directory} has no demo in it: remove it, or give another --data-dir.")
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
            raise FinalError(f"{path} cannot be read ({error}); remove {directory} to begin again.") from error
        if record.plan != plan:
            raise FinalError(
                f"{directory} has a demo with {_difference(record.plan, plan)}: repeat that one, remove the directory, "
                "or give another --data-dir."
            )
        return record

    @property
    def begun(self) -> bool:
        """Whether there is something to go on from."""
        return self.seconds_per_answer is not None

    @property
    def pace(self) -> Pace:
        """How fast the work goes here; call it once it was measured."""
        assert self.seconds_per_answer is not None
        return Pace(self.seconds_per_answer * self.work.max_tokens / Work().max_tokens)

    @property
    def promoted(self) -> dict[str, Any] | None:
        """The report of the round that was promoted."""
        return next((report for report in self.reports if report["state"] == "promoted"), None)

    @property
    def refused_twice(self) -> bool:
        """Whether there is nothing more to try."""
        return len(self.reports) >= ROUNDS and not self.promoted

    @contextmanager
    def step(self) -> Iterator[None]:
        """Writes what the block changes."""
        with self._writing:
            yield
            self.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to a stage's, also where it fails."""
        started = time.monotonic()
        try:
            yield
        finally:
            with self.step():
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def write(self) -> None:
        """Replaces the file by one with what there is now."""
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
