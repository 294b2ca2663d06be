"""Results that are saved as they are computed, so that a killed benchmark resumes after the last one; and results of a
separate process, with its peak memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON in `path`; if there is none, the result of `make`, which is printed and written there atomically."""
    if not path.exists():
        text = json.dumps(make())
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(".partial")
        staging.write_text(text)
        staging.rename(path)
        print(f"{path.parent.name} {path.stem}: {text[:400]}", file=sys.stderr, flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def measured_apart(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object that a process prints, with its peak memory as `peak_mib`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the measurement ended with {process.returncode}")
    return {**json.loads(out), "peak_mib": usage.ru_maxrss / 2**10}
