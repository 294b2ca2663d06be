"""The device that the learner computes on, and its memory."""

from typing import NamedTuple

import torch

from server.shared.errors import FailedPreconditionError
from server.shared.gpu_shares import BESIDE_ENGINES, sum_of_shares
from server.shared.machine import GIB
from server.shared.model.dtype import engine_uses_gpu


class GpuMemory(NamedTuple):
    """Bytes of a GPU's memory: free now, and in all."""

    free: int
    total: int


def resolve_device(setting: str) -> torch.device:
    """The device for the setting `learner_device` on this machine. `learner.process.set_environment` leaves a chosen
    GPU as the only one, so that `cuda` is it. Raises FailedPreconditionError if torch cannot use it."""
    if setting == "cpu" or (setting == "auto" and not engine_uses_gpu()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FailedPreconditionError(
            "NO_GPU",
            f"PREFLOOP_LEARNER_DEVICE is {setting}, but torch cannot use such a GPU: set it to auto, or see what "
            "`server doctor` says about the GPU.",
        )
    return torch.device("cuda")


def require_memory(server_share: float, learner_share: float) -> None:
    """Raises FailedPreconditionError if engines run on a GPU and it has too little free memory for a round."""
    if engine_uses_gpu() and (problem := memory_problem(read_memory(), server_share, learner_share)):
        raise FailedPreconditionError("GPU_MEMORY", problem)


def read_memory() -> GpuMemory:
    """The GPU's memory."""
    return GpuMemory(*torch.cuda.mem_get_info())


def memory_problem(memory: GpuMemory, server_share: float, learner_share: float) -> str | None:
    """Why a round does not fit into the GPU's free memory, as a sentence; None if it does."""
    needed = (learner_share + BESIDE_ENGINES) * memory.total
    if memory.free >= needed:
        return None
    return (
        f"The GPU has {memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB free, but a round needs "
        f"{needed / GIB:.1f} (shares of the GPU: {sum_of_shares(server_share, learner_share)}): lower "
        "PREFLOOP_LEARNER_GPU_MEMORY_SHARE, or PREFLOOP_SERVER_GPU_MEMORY_SHARE and restart the server, or stop other "
        "programs on the GPU, or choose another GPU with PREFLOOP_LEARNER_DEVICE, for example cuda:1."
    )
