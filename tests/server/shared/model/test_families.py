"""Which families are refused, for what, and where."""

import json
from pathlib import Path

import pytest

from server.shared.model import families
from server.shared.model.families import LIMITS, limit_of
from tests.families.configs import FAMILIES


def of_family(directory: Path, family: str) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    return directory


def test_a_family_that_cannot_be_served_cannot_learn_either(tmp_path: Path) -> None:
    of_family(tmp_path, "phimoe")
    for work in families.WORKS:
        limit = limit_of(tmp_path, "bfloat16", work)
        assert limit
        assert limit.reason == 'vLLM 0.32 cannot run it: "too many values to unpack (expected 3)"'


def test_a_family_that_learns_by_lora_only(tmp_path: Path) -> None:
    of_family(tmp_path, "gpt_oss")
    assert limit_of(tmp_path, "float32", "serving") is None
    assert limit_of(tmp_path, "float32", "learning") is None
    assert limit_of(tmp_path, "float32", "full training") is LIMITS["gpt_oss"]


@pytest.mark.parametrize(
    ("family", "cpus", "dtype", "refused"),
    [
        ("mamba", True, "bfloat16", True), ("mamba", False, "bfloat16", False),
        ("qwen3_next", True, "float32", True), ("qwen3_next", True, "bfloat16", False),
        ("qwen3_next", False, "float32", False), ("llama", True, "float32", False),
        ("lfm2", True, "float32", True), ("lfm2", False, "float32", False),
        ("unheard_of", True, "float32", False),
    ],
)  # fmt: skip
def test_some_are_refused_on_a_cpu_only(
    family: str, cpus: bool, dtype: families.DtypeName, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "engine_is_for_cpus", lambda: cpus)
    monkeypatch.setattr(families, "has_avx2_only", lambda: False)
    assert bool(limit_of(of_family(tmp_path, family), dtype, "serving")) is refused


@pytest.mark.parametrize(
    ("capabilities", "refused"),
    [({"avx2": True, "avx512_f": True}, True), ({"avx2": True, "avx512_f": False}, False), ({"sve": True}, True)],
)
def test_some_are_refused_where_they_were_not_seen_to_be_right(
    capabilities: dict[str, bool], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "engine_is_for_cpus", lambda: True)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert bool(limit_of(of_family(tmp_path, "lfm2_moe"), "float32", "serving")) is refused


def test_a_directory_without_a_configuration_is_of_no_family(tmp_path: Path) -> None:
    """The packaged default is one GGUF file."""
    assert limit_of(tmp_path, "float32", "full training") is None


def test_every_limit_is_of_a_family_that_was_tried() -> None:
    assert sorted(set(LIMITS) - set(FAMILIES)) == []
