"""Where the learner computes, and whether a GPU has room for a round."""

import pytest
import torch
from pydantic import ValidationError

import learner.model.device as module
from learner.model.device import GpuMemory, memory_problem, require_memory, resolve_device
from learner.settings import LearnerSettings
from server.shared.errors import FailedPreconditionError

GIB = 2**30


@pytest.mark.parametrize(
    ("setting", "gpu", "engine_for_cpus", "device"),
    [
        ("auto", True, False, "cuda"),
        ("auto", True, True, "cpu"),
        ("auto", False, False, "cpu"),
        ("cpu", True, False, "cpu"),
        ("cuda", True, False, "cuda"),
        # The trainer's alone: the engine is on the CPU.
        ("cuda", True, True, "cuda"),
        # The others are hidden.
        ("cuda:1", True, False, "cuda"),
    ],
)
def test_the_device(
    setting: str, gpu: bool, engine_for_cpus: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("server.shared.model.dtype.engine_is_for_cpus", lambda: engine_for_cpus)
    assert resolve_device(setting) == torch.device(device)


@pytest.mark.parametrize("setting", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FailedPreconditionError) as error:
        resolve_device(setting)
    assert str(error.value) == (
        f"PREFLOOP_LEARNER_DEVICE is {setting}, but torch cannot use such a GPU: set it to auto, or see what "
        "`server doctor` says about the GPU."
    )


@pytest.mark.parametrize("setting", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0,1", "CUDA", " cpu", "cuda:1\n", ""])
def test_other_devices_are_no_setting(setting: str) -> None:
    with pytest.raises(ValidationError, match="must be auto, cpu, cuda, or cuda and a number such as cuda:1"):
        LearnerSettings(learner_device=setting)


@pytest.mark.parametrize(
    ("free", "server", "learner", "fits"),
    [
        # The server already has its half.
        (39.0, 0.5, 0.3, True),
        (28.0, 0.5, 0.3, True),
        (27.9, 0.5, 0.3, False),
        # More than one GPU has, but the server is elsewhere.
        (79.0, 0.9, 0.9, True),
        (7.0, 0.9, 0.3, False),
    ],
)
def test_a_round_fits_if_its_share_is_free(free: float, server: float, learner: float, fits: bool) -> None:
    problem = memory_problem(GpuMemory(round(free * GIB), 80 * GIB), server, learner)
    assert (problem is None) == fits


def test_too_little_free_memory_is_a_sentence_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * GIB, 80 * GIB))
    monkeypatch.setattr(module, "engine_uses_gpu", lambda: True)
    with pytest.raises(FailedPreconditionError) as error:
        require_memory(0.8, 0.25)
    assert str(error.value) == (
        "The GPU has 8.0 of 80.0 GiB free, but a round needs 24.0 (shares of the GPU: server 0.8 + learner 0.25 = "
        "1.05): lower PREFLOOP_LEARNER_GPU_MEMORY_SHARE, or PREFLOOP_SERVER_GPU_MEMORY_SHARE and restart the server, "
        "or stop other programs on the GPU, or choose another GPU with PREFLOOP_LEARNER_DEVICE, for example cuda:1."
    )
    monkeypatch.setattr(module, "engine_uses_gpu", lambda: False)
    require_memory(0.8, 0.25)
