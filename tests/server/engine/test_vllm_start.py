"""The engine's arguments and environment, from settings and the installation's path."""

from pathlib import Path
from typing import get_args

import pytest

from server.engine.vllm_start import preloaded, slots_rank
from server.settings import ServerSettings


@pytest.mark.parametrize(("rank", "made_for"), [(1, 1), (2, 8), (12, 16), (16, 16), (33, 64), (512, 512)])
def test_adapter_memory_has_a_rank_that_vllm_supports(rank: int, made_for: int) -> None:
    assert slots_rank(ServerSettings(adapter_rank=rank).adapter_rank) == made_for


def test_the_largest_allowed_rank_is_vllms() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert max(get_args(MaxLoRARanks)) == 512


def test_a_library_in_a_folder_with_a_space_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/lib")
    assert preloaded(Path("/opt/prefloop/lib/libiomp5.so")) == {"LD_PRELOAD": "/opt/prefloop/lib/libiomp5.so"}
    assert preloaded(Path("/home/ann/my chat/lib/libiomp5.so")) == {
        "LD_PRELOAD": "libiomp5.so",
        "LD_LIBRARY_PATH": "/home/ann/my chat/lib:/usr/local/lib",
    }
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert preloaded(Path("/home/ann/my chat/lib/libiomp5.so"))["LD_LIBRARY_PATH"] == "/home/ann/my chat/lib"
