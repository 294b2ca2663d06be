"""Results that are saved as they are computed, so that a killed benchmark resumes after the last one."""

import json
import sys
from collections.abc import Callable
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
