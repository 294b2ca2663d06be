"""A newer x86 processor that passes for one with AVX2 only: no AVX-512, no AMX, no bfloat16 arithmetic.

Put this folder first on PYTHONPATH (`make test-avx2`): Python runs this file before anything else, in child processes
too. What reads the environment is held back by it; `torch.cpu` answers accordingly, and vLLM loads the library that
it built for AVX2. What stays: cores, clock and caches are this machine's, so seconds are not those of an older one,
and PyTorch outside vLLM still takes bfloat16 products to oneDNN, which has no fast ones there, either.
"""

import os
import sys
from collections.abc import Mapping
from importlib import util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

HELD_BACK = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
NEWER = ("avx512", "avx10", "avx_vnni", "avx_ne_convert", "amx")


class AVX2Only:
    """Finds `torch.cpu` and changes what it says of the processor; torch itself is imported when someone needs it."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch.cpu" or not (spec := PathFinder.find_spec(name, path, target)) or not spec.loader:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # Every other question in torch.cpu asks this one.
            module.get_capabilities = without_newer(module.get_capabilities)  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def without_newer(get_capabilities: Any) -> Any:
    def capabilities() -> Mapping[str, Any]:
        return MappingProxyType(
            {name: not name.startswith(NEWER) and value for name, value in get_capabilities().items()}
        )

    return capabilities


os.environ.update(HELD_BACK)
sys.meta_path.insert(0, AVX2Only)  # type: ignore[arg-type]

# The one that this file stands before, if there is one.
elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
if (next_one := PathFinder.find_spec("sitecustomize", elsewhere)) and next_one.loader:
    next_one.loader.exec_module(util.module_from_spec(next_one))
