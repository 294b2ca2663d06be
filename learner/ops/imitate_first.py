"""What `learner run-once` does before a round of votes: learn from demonstrations, if enough wait.

In a process of its own, so that its engine and its memory are gone before the next one is planned, and so that after a
failure the votes are learned from all the same.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from learner.process import STOPPED
from learner.round.report import Report
from learner.round.sft.due import due
from learner.settings import LearnerSettings
from server.store.store import Store

STOP_SECONDS = 60


def imitate_first(settings: LearnerSettings, say: Callable[[str], None]) -> Report | None:
    """The outcome of `learner sft`, or None if it was not due. Raises KeyboardInterrupt if it was stopped."""
    if not Store.exists(settings.data_dir):
        return None
    with closing(Store.open(settings.data_dir)) as store:
        if not due(store, settings.sft.min_new):
            return None
    say("learning from demonstrations first")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        # Its output is the user's; standard output is for this command's own result.
        process = subprocess.Popen(command(settings, file), stdout=sys.stderr)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait(STOP_SECONDS)
            raise
        if status == STOPPED:
            raise KeyboardInterrupt
        if not file.exists():
            return Report("failed", f"Learning from demonstrations ended with status {status}.")
        return Report.from_json(json.loads(file.read_text(encoding="utf-8")))


def command(settings: LearnerSettings, report: Path) -> list[str]:
    """Other settings than these flags are read from where this process read them."""
    flags = {
        "--data-dir": settings.data_dir,
        "--train": settings.policy.train,
        "--seed": settings.seed,
        "--report": report,
    }
    given = [str(part) for flag in flags.items() for part in flag]
    return [sys.executable, "-m", "learner.cli", "sft", "--wait", *given]


def both(before: Report | None, report: Report) -> Report:
    """The outcome of a run whose round of votes came after one of demonstrations."""
    if before is None or before.state == "nothing":
        return report
    failed = "Learning from demonstrations failed: " if before.state == "failed" else ""
    if report.state == "nothing" and not failed:
        return before
    return replace(report, sentence=f"{failed}{before.sentence} {report.sentence}")
