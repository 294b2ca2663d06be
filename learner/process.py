"""How a process behaves beside others: its name, what it takes from the kernel, and to whom it gives way."""

import ctypes
import os
import socket
import uuid
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learner.settings import LearnerSettings

# The exit status of a round that was asked to stop; a shell says it of what Ctrl-C ended.
STOPPED = 130
# Turns of its loop for which a thread of OpenMP waits before it sleeps, some microseconds. By default it waits
# for milliseconds on a core that the server's engine needs (docs/decisions/0026-every-cpu.md).
SPIN = "100"
# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def unique_name() -> str:
    """Of this process, and never of another one."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def set_environment(settings: "LearnerSettings") -> None:
    """vLLM reads these once, at import, and so does OpenMP, which comes with torch: call it before either is imported.
    What the operator set stays."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if settings.cpu_threads == "auto" else settings.cpu_threads,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "TOKENIZERS_PARALLELISM": "false",
        # Bars and warnings of libraries that an operator can do nothing about; the round has its own.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TQDM_DISABLE": "1",
    }
    if "OMP_WAIT_POLICY" not in os.environ:
        defaults["GOMP_SPINCOUNT"] = SPIN
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\b")


def keep_freed_memory() -> None:
    """Freed blocks stay with the process, where its C library is glibc.

    Training makes and drops tensors of many megabytes in every pass. By default each is mapped and unmapped again, and
    the kernel's clearing of the pages took a fifth of an update's time (docs/decisions/0009)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def give_way(nice: int, threads: int) -> None:
    """The server goes first where both want the processor; `threads` of computing at most, 0 for one on each core.

    Call it before torch computes: a pool of threads keeps its size."""
    import torch

    # What the process was started with counts too: `nice learner run-once` is not made less nice.
    os.nice(max(0, nice - os.nice(0)))
    if threads:
        torch.set_num_threads(threads)
