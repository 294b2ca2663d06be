"""The findings of `server doctor` on this machine, if available: problems, and the expected duration of the demo."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.demo.plan import Work

DOCTOR_SECONDS = 30.0
SHOWN = 2
# The demo's server takes free ports.
OTHERS = ("port", "metrics port")


@dataclass(frozen=True)
class Machine:
    """Warnings for the user, and the expected seconds per answer when sixteen run at once."""

    warnings: list[str]
    seconds_per_answer: float | None


def look(data_dir: Path, model: str | None) -> Machine:
    """Runs the doctor. Returns an empty result if there is no doctor or it fails."""
    command = [sys.executable, "-m", "server.cli", "doctor", "--json", "--data-dir", str(data_dir)]
    command += ["--model", model] if model else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOCTOR_SECONDS, check=False)
        return read(json.loads(done.stdout))
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return Machine([], None)


def read(report: dict[str, Any]) -> Machine:
    """The parts of the doctor's report that matter to the demo."""
    warnings = [report["slow_reason"]] if report["slow_reason"] else []
    warnings += [one["advice"] for one in report["findings"] if one["state"] != "ok" and one["name"] not in OTHERS]
    speed = report["tokens_per_second"]
    return Machine(warnings[:SHOWN], Work().max_tokens / speed["sixteen"] if speed else None)
