"""The memory of one PPO update with long answers, beside what `server doctor` and the learner compute for it.

    python benchmarks/memory.py [--shapes 135M 1.5B] [--dtypes float32] [--train lora] [--keep kept checkpointed]
        [--tokens 512]

Models have random weights in real shapes, answers are random tokens: memory depends on neither. Rows of prompt and
answer are so long that micro-batches are full. Each line of the result is a separate process: it loads the model, makes
one update of two minibatches (`gpu_update`), and reads the kernel's peak of its resident memory. The peak counts from
when the model was loaded, since the size of its weights is known. As in a round, freed memory is kept unless
activations are computed again. Prints one JSON line last.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_update
import torch
from transformers import AutoModelForCausalLM

from learner.model.checkpointing import checkpoint_layers
from learner.model.policy import TrainablePolicy, lora
from learner.model.rollout import Rollout
from learner.process import keep_freed_memory, return_large_blocks
from server.shared.model.dtype import DtypeName, torch_dtype
from server.shared.model.needs import Training, round_need, version_size
from server.shared.model.shape import shape_of

SECONDS = 3_600
RANK = 16
# The learner's defaults of `policy.micro_batch_tokens`.
BUDGETS = {"bfloat16": 2048, "float32": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(gpu_update.SHAPES), default=["135M", "1.5B"])
    parser.add_argument("--dtypes", nargs="+", choices=list(BUDGETS), default=["float32"])
    parser.add_argument("--train", nargs="+", choices=["lora", "full"], default=["lora"])
    parser.add_argument("--keep", nargs="+", choices=["kept", "checkpointed"], default=["kept", "checkpointed"])
    parser.add_argument("--tokens", type=int, default=512, help="most tokens of a prompt and its answer")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = [
        {"shape": shape, "dtype": dtype, "train": train, "keep": keep, "tokens": arguments.tokens}
        for shape in arguments.shapes
        for dtype in arguments.dtypes
        for train in arguments.train
        for keep in arguments.keep
    ]
    if arguments.run:
        print(json.dumps(measure(**cases[0])))
        return
    results = [in_a_process(case) for case in cases]
    print(json.dumps({"benchmark": "memory", "results": results}))


def in_a_process(case: dict[str, Any]) -> dict[str, Any]:
    options = [
        f"--{name}={case[single]}"
        for name, single in (
            ("shapes", "shape"), ("dtypes", "dtype"), ("train", "train"), ("keep", "keep"), ("tokens", "tokens"),
        )
    ]  # fmt: skip
    command = [sys.executable, __file__, *options, "--run"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{found['shape']:>5} {found['dtype']:<8} {found['train']:<4} {found['keep']:<12} "
        f"measured {found['measured_gib']:5.2f} GiB, computed {found['computed_gib']:5.2f} GiB, "
        f"{found['seconds']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return found


# One line, in a separate process


def measure(shape: str, dtype: DtypeName, train: str, keep: str, tokens: int) -> dict[str, Any]:
    keep_freed_memory()
    if keep == "checkpointed":
        return_large_blocks()
    config, budget = gpu_update.SHAPES[shape], BUDGETS[dtype]
    policy = make_policy(config, torch_dtype(dtype), train, keep == "checkpointed")
    # A prompt has up to three tokens more than OWN.
    length = tokens - gpu_update.SHARED - gpu_update.OWN - 3
    rollout = gpu_update.make_rollout([length] * (2 * budget // tokens), config.vocab_size)
    settings = argparse.Namespace(**{**vars(gpu_update.SETTINGS), "micro_batch_tokens": budget})
    before, started = read_kib("VmRSS"), time.perf_counter()
    reset_peak()
    gpu_update.update(policy, rollout, settings, {})
    return {
        "shape": shape, "dtype": dtype, "train": train, "keep": keep, "tokens": tokens,
        "measured_gib": round((read_kib("VmHWM") - before) / 2**20, 2),
        "computed_gib": round(computed(config, dtype, train, keep == "checkpointed", rollout) / 2**30, 2),
        "loaded_gib": round(before / 2**20, 2),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def make_policy(config: Any, dtype: torch.dtype, train: str, checkpoint: bool) -> TrainablePolicy:
    def make() -> Any:
        model = gpu_update.make_model(config, dtype, torch.device("cpu"))
        if checkpoint:
            checkpoint_layers(model)
        return model

    if train == "full":
        return TrainablePolicy(make(), make().requires_grad_(False))
    return TrainablePolicy(lora(make(), RANK, 2 * RANK), None)


def computed(config: Any, dtype: DtypeName, train: Any, checkpoint: bool, rollout: Rollout) -> int:
    """Bytes of an update beyond the loaded weights, by the formula of `server.shared.model.needs`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shape = shape_of({name: list(parameter.shape) for name, parameter in model.named_parameters()})
    training = Training(
        train,
        RANK,
        tokens=BUDGETS[dtype],
        rollout_tokens=int(rollout.tokens.response_mask.sum()),
        checkpoint=checkpoint,
    )
    need = round_need(shape, dtype, 0, training)
    loaded = version_size(shape, dtype) * (2 if train == "full" else 1)
    return need.total - need.engine - loaded


def reset_peak() -> None:
    """proc_pid_clear_refs(5): the peak is from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_kib(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1])  # type: ignore[index]


if __name__ == "__main__":
    main()
