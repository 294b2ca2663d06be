"""What training by workers costs, and whether it trains the same: a round by one process, by one worker and by two.

    python benchmarks/workers.py MODEL --work-dir DIR [--steps 4] [--train lora] [--dtype float32] [--write]

The three rounds learn from the same votes with the same seed. In float32 their steps should have the same figures but
for rounding, up to the first answer that rounding changes. On a machine whose cores one process fills, two workers gain
nothing: what they cost is shown. `--write` writes docs/benchmarks/workers.md. Prints one JSON line last.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

from pool import Cell, make_data, make_pool
from study import run_round, say

REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "workers.md"
ARMS = {"the round's process": 0, "one worker": 1, "two workers": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory or id, or `smollm2`")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--train", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    work: Path = arguments.work_dir.resolve()
    pairs = make_pool(arguments.model, work, say)
    results = {}
    for arm, count in ARMS.items():
        data = work / "workers"
        rmtree(data, ignore_errors=True)
        make_data(work, data, Cell("short", 200, 0.1, 0), pairs)
        report = run_round(
            data, 0, PREFLOOP_WORKERS__COUNT=str(count), PREFLOOP_PPO__STEPS=str(arguments.steps),
            PREFLOOP_POLICY__TRAIN=arguments.train, PREFLOOP_DTYPE=arguments.dtype,
        )  # fmt: skip
        metrics = report["metrics"]
        seconds = metrics["seconds"]
        results[arm] = {
            "state": report["state"],
            "improve": seconds["improve"],
            "round": sum(seconds.values()),
            "steps": [{name: step[name] for name in ("score", "kl")} for step in metrics["improvement"]["steps"]],
        }
        say(f"{arm}: {json.dumps(results[arm])}")
    if arguments.write:
        REPORT.write_text("\n".join(page(results, arguments)) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "workers", "results": results}))


def page(results: dict[str, Any], arguments: argparse.Namespace) -> Iterator[str]:
    """Its lines."""
    yield "# Training by workers"
    yield ""
    yield f"`python benchmarks/workers.py`: {arguments.steps} steps of PPO, {arguments.train}, {arguments.dtype}, all"
    yield "processes on this machine's cores. The program's docstring says what is done."
    yield ""
    yield "| trained by | training, s | whole round, s | score of each step | KL of each step, nats |"
    yield "|---|---:|---:|---|---|"
    for arm, one in results.items():
        scores, kls = (", ".join(f"{step[name]:.5f}" for step in one["steps"]) for name in ("score", "kl"))
        yield f"| {arm} | {one['improve']:.0f} | {one['round']:.0f} | {scores} | {kls} |"


if __name__ == "__main__":
    main()
