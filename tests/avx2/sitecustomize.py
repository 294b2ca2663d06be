"""Makes a newer x86 processor look like one with only AVX2: no AVX-512, no AMX, no bfloat16 arithmetic.

Put this folder first on PYTHONPATH (`make test-avx2`): Python runs this file before anything else, in child processes
too. It restricts libraries through their environment variables and patches `torch.cpu`, so that vLLM loads its AVX2
build. Cores, clock and caches remain this machine's, so timings are not those of an older one. PyTorch outside vLLM
still uses oneDNN for bfloat16 products, which has no fast ones on AVX2 either.
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
    """Patches the capabilities that `torch.cpu` reports when it is imported, without importing torch itself."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch.cpu" or not (spec := PathFinder.find_spec(name, path, target)) or not spec.loader:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # All other queries in torch.cpu use this function.
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

# The sitecustomize that this file shadows, if there is one.
elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
if (next_one := PathFinder.find_spec("sitecustomize", elsewhere)) and next_one.loader:
    next_one.loader.exec_module(util.module_from_spec(next_one))
