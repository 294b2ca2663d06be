"""Correctness and speed of the learner's calculations on a GPU.

    python benchmarks/gpu.py [--device cuda] [--quick] [--seconds 520] [--write]

Needs only torch, transformers and peft, and no files: models have the shapes of SmolLM2-135M and Qwen2.5-1.5B, and a
tiny one, with random weights, and responses consist of random tokens.

- Check, in float32: log-probabilities and pooled features on the device against the model's own logits and hidden
  states on the CPU, one response at a time; then a PPO update on the device against the same update on the CPU.
- Check, in bfloat16: log-probabilities on the device against float32 on the CPU, then the same update as above. Only
  the log-probabilities have a limit: the kernels of the two devices round differently.
- Speed, in the dtype that suits the device: the stages of an update without sampling, at the learner's defaults except
  for the micro-batch. Medians of three updates after a warm-up. Nothing is compiled.
- Engine, on a GPU with vLLM: seconds of its start, of a push of weights, of sleeping and of a push that wakes it; and
  how far its log-probabilities are from the trainer's, before it slept and after.

`--device cpu --quick` is a dry run of all but the engine, with small models. Each part is a JSON line, and so is all
together, last. After `--seconds` the script stops by itself and reports the parts that it has. The exit status is 1 if
a check failed. `--write` replaces docs/benchmarks/gpu.md after a complete run on a GPU.
"""

import argparse
import gc
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import gpu_report
import peft
import torch
import transformers
from gpu_checks import check, check_bfloat16, judged
from gpu_engine import try_engine
from gpu_update import RESPONSES, SETTINGS, SHAPES, figures, make_engine, make_rollout, say, update

TIMED = ("135M", "1.5B")
QUICK = {"hidden_size": 144, "intermediate_size": 288, "num_hidden_layers": 3, "vocab_size": 2048}
# Tokens per response and per micro-batch: 8, 32 and 8 answers with their prompts' own tokens.
CASES = [(64, 640), (64, 2560), (512, 4224)]
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "gpu.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--quick", action="store_true", help="small models and short responses: a dry run")
    parser.add_argument("--seconds", type=int, default=520, help="stop after this time")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/gpu.md")
    arguments = parser.parse_args()
    started, found, complete = time.monotonic(), [], False
    try:
        with limited(arguments.seconds):
            for part in parts(arguments.device, arguments.quick):
                found.append(part)
                print(json.dumps(part), flush=True)
            complete = True
    except TimeoutError:
        say(f"stopped after {arguments.seconds} s")
    failed = [f"{part['shape']} {what}" for part in found for what in part.get("failed", ())]
    result = {
        "benchmark": "gpu", "quick": arguments.quick, "complete": complete, "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - started, 1), "failed": failed, "parts": found,
    }  # fmt: skip
    if arguments.write and complete and not arguments.quick and arguments.device.type == "cuda":
        PAGE.write_text(gpu_report.page(result), encoding="utf-8")
    elif arguments.write:
        say("nothing was written: the page needs a complete run on a GPU")
    say(f"{result['seconds']} s in all; " + (f"WRONG: {', '.join(failed)}" if failed else "every check passed"))
    print(json.dumps(result))
    sys.exit(bool(failed))


def parts(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Yields what was measured, part by part, the most important first."""
    if quick:
        # Threads that wait for each other would take most of the time.
        torch.set_num_threads(1)
    machine = describe(device)
    say(f"{machine['name']}: {machine['dtype']}, {machine['reason']}")
    yield {"part": "machine", **machine}
    for name, config in SHAPES.items():
        if quick:
            config.update(QUICK)
        yield judged({"part": "float32", "shape": name, **check(config, device)})
    for name, config in SHAPES.items():
        # On a CPU, an update of the largest would take most of the time.
        if name != "1.5B" or quick:
            yield {"part": "bfloat16", "shape": name, **check_bfloat16(config, device)}
    for name in TIMED:
        for case in cases(name, SHAPES[name], device, machine["dtype"], quick):
            yield {"part": "speed", "shape": name, **case}
    yield {"part": "engine", **try_engine(device)}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block once the time is over."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, and the dtype by the rule: bfloat16 from compute capability 8.0 on."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    if device.type != "cuda":
        return {"name": device.type, "dtype": "float32", "reason": "no GPU", "versions": versions}
    capability = torch.cuda.get_device_capability(device)
    return {
        "name": torch.cuda.get_device_name(device),
        "dtype": "bfloat16" if capability >= (8, 0) else "float32",
        "reason": f"compute capability {capability[0]}.{capability[1]}",
        "versions": {**versions, "cuda": torch.version.cuda},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def cases(name: str, config: Any, device: torch.device, dtype: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Seconds of each stage, response tokens per second and peak device memory, for every case."""
    policy = make_engine(config, getattr(torch, dtype), device)
    for length, budget in CASES:
        length = length // 8 if quick else length
        settings = SimpleNamespace(**{**vars(SETTINGS), "micro_batch_tokens": budget})
        rollout = make_rollout([length] * RESPONSES, config.vocab_size).to(device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        runs: list[dict[str, float]] = []
        for _ in range(2 if quick else 4):
            runs.append({})
            stats = update(policy, rollout, settings, runs[-1])
            assert stats.optimizer_steps == settings.epochs * settings.minibatches
        stages = {stage: round(median(run[stage] for run in runs[1:]), 4) for stage in runs[0]}
        seconds = median(sum(run.values()) for run in runs[1:])
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        case = {
            "responses": RESPONSES, "tokens": length, "micro_batch_tokens": budget, "dtype": dtype, "stages": stages,
            "seconds": round(seconds, 4), "response_tokens_per_s": round(RESPONSES * length / seconds),
            "first_seconds": round(sum(runs[0].values()), 4), "first_ratio_error": stats.first_ratio_error,
            "peak_gib": peak and round(peak, 2),
        }  # fmt: skip
        say(
            f"{name} {dtype}, {RESPONSES} x {length} tokens, micro-batch of {budget}: {seconds:.3f} s "
            f"({figures(stages)}), {case['response_tokens_per_s']} tokens/s, peak {case['peak_gib']} GiB"
        )
        yield case


if __name__ == "__main__":
    main()
