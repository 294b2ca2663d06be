"""Which dtype a machine computes in."""

from typing import Any

import pytest
import torch

from server.shared.model import dtype
from server.shared.model.dtype import DtypeSetting, choose_dtype, resolve_dtype

AVX2: dict[str, Any] = {"architecture": "x86_64", "avx2": True, "fma3": True, "avx512_f": False, "avx512_bf16": False}
SKYLAKE = {**AVX2, "avx512_f": True, "amx_bf16": False}
NOTHING = "the processor has no bfloat16 instructions"


@pytest.mark.parametrize(
    ("cuda", "cpu", "name", "reason"),
    [
        (None, AVX2, "float32", NOTHING),
        (None, SKYLAKE, "float32", NOTHING),
        (None, {**SKYLAKE, "avx512_bf16": True}, "bfloat16", "the processor has AVX512-BF16"),
        (None, {**SKYLAKE, "amx_bf16": True}, "bfloat16", "the processor has AMX-BF16"),
        (None, {"architecture": "aarch64", "neon": True, "bf16": True}, "bfloat16", "the processor has Arm BF16"),
        (None, {"architecture": "aarch64", "neon": True, "bf16": False}, "float32", NOTHING),
        # A torch that does not know this processor reports no capabilities.
        (None, {}, "float32", NOTHING),
        ((9, 0), AVX2, "bfloat16", "a GPU of compute capability 9.0"),
        ((8, 0), AVX2, "bfloat16", "a GPU of compute capability 8.0"),
        ((7, 5), {**SKYLAKE, "avx512_bf16": True}, "float32", "a GPU of compute capability 7.5"),
    ],
)
def test_auto_is_bfloat16_if_the_hardware_multiplies_in_it(
    cuda: tuple[int, int] | None, cpu: dict[str, Any], name: str, reason: str
) -> None:
    found = choose_dtype("auto", cuda, cpu)
    assert (found.name, found.reason) == (name, reason)


@pytest.mark.parametrize(
    ("setting", "cpu", "said"),
    [
        ("float32", {"avx512_bf16": True}, "float32 (as set)"),
        ("bfloat16", {"avx512_bf16": True}, "bfloat16 (as set)"),
        ("bfloat16", AVX2, f"bfloat16 (as set; expect it to be slow: {NOTHING})"),
    ],
)
def test_a_setting_wins_with_a_warning_if_it_is_slow(setting: DtypeSetting, cpu: dict[str, Any], said: str) -> None:
    assert str(choose_dtype(setting, None, cpu)) == said


@pytest.mark.parametrize(("for_cpus", "reason"), [(True, NOTHING), (False, "a GPU of compute capability 9.0")])
def test_a_gpu_that_the_engine_does_not_use_is_ignored(
    monkeypatch: pytest.MonkeyPatch, for_cpus: bool, reason: str
) -> None:
    monkeypatch.setattr(dtype, "engine_is_for_cpus", lambda: for_cpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX2)
    assert resolve_dtype("auto").reason == reason


def test_this_machines_dtype_is_never_auto() -> None:
    assert resolve_dtype("auto").name in ("bfloat16", "float32")
    assert resolve_dtype("float32").name == "float32"
