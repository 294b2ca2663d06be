"""The engine's arguments and environment, from settings and the installation's path."""

import os
from pathlib import Path
from typing import get_args

import pytest

from learner import process
from learner.settings import LearnerSettings
from server.engine import vllm_start
from server.engine.vllm_start import preloaded, slots_rank
from server.settings import ServerSettings


@pytest.mark.parametrize(("rank", "made_for"), [(1, 1), (2, 8), (12, 16), (16, 16), (33, 64), (512, 512)])
def test_adapter_memory_has_a_rank_that_vllm_supports(rank: int, made_for: int) -> None:
    assert slots_rank(ServerSettings(adapter_rank=rank).adapter_rank) == made_for


def test_the_largest_allowed_rank_is_vllms() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert max(get_args(MaxLoRARanks)) == 512


@pytest.mark.parametrize(("cpus", "value"), [(True, "1"), (False, None)])
def test_latent_attention_is_ordinary_attention_in_both_engines_on_a_cpu(
    cpus: bool, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.shared.model.dtype.engine_is_for_cpus", lambda: cpus)
    for set_environment, settings in (
        (vllm_start.set_environment, ServerSettings()),
        (process.set_environment, LearnerSettings()),
    ):
        monkeypatch.setattr(os, "environ", {})
        set_environment(settings)  # type: ignore[operator]
        assert os.environ.get("VLLM_MLA_DISABLE") == value


def test_a_library_in_a_folder_with_a_space_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/lib")
    assert preloaded(Path("/opt/prefloop/lib/libiomp5.so")) == {"LD_PRELOAD": "/opt/prefloop/lib/libiomp5.so"}
    assert preloaded(Path("/home/ann/my chat/lib/libiomp5.so")) == {
        "LD_PRELOAD": "libiomp5.so",
        "LD_LIBRARY_PATH": "/home/ann/my chat/lib:/usr/local/lib",
    }
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert preloaded(Path("/home/ann/my chat/lib/libiomp5.so"))["LD_LIBRARY_PATH"] == "/home/ann/my chat/lib"
