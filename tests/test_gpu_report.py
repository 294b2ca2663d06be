"""The page that `benchmarks/gpu.py --write` makes, which needs a GPU to be made for real."""

from pathlib import Path
from typing import Any

import pytest

MEANS = {"policy_loss": -0.05, "other_loss": 0.28, "approx_kl": 0.0078, "grad_norm": 7.01}
CHECK = {
    "part": "float32", "shape": "tiny", "logprobs": 1.5e-5, "ref_logprobs": 1.7e-5, "features": 2.4e-5,
    "statistics": 1.1e-5, "adapters": 1.5e-3, "bfloat16_rms": 0.051, "update": {"cpu": MEANS, "device": MEANS},
    "failed": [],
}  # fmt: skip
SPEED = {
    "part": "speed", "shape": "1.5B", "tokens": 64, "micro_batch_tokens": 2560, "seconds": 1.127, "peak_gib": 8.7,
    "stages": {"reference": 0.174, "policy": 0.129, "experience": 0.009, "training": 0.815},
    "response_tokens_per_s": 1817,
}  # fmt: skip
ENGINE = {
    "part": "engine", "start_s": 21.5, "push_s": 0.21, "sleep_s": 0.4, "waking_push_s": 0.6, "freed_gib": 22.1,
    "sampled_tokens_per_s": 4000, "mismatch_rms": 0.06, "mismatch_rms_after_sleep": 0.061,
}  # fmt: skip


def page(engine: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import gpu_report  # type: ignore[import-not-found]

    machine = {
        "part": "machine", "name": "NVIDIA H100", "reason": "compute capability 9.0", "dtype": "bfloat16",
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    half = {"part": "bfloat16", "shape": "tiny", "logprobs_rms": 0.02, "statistics": 0.1, "adapters": 0.3}
    result = {"date": "2026-11-27", "seconds": 113.4, "parts": [machine, CHECK, half, SPEED, engine]}
    lines: list[str] = gpu_report.page(result).splitlines()
    return lines


def test_the_page(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = page(ENGINE, root, monkeypatch)
    assert max(map(len, lines)) <= 120
    for line in (
        "# The learner's calculations on a GPU",
        "| log-probabilities of the policy, nats | 1.5e-05 |",
        "| the update's means | tiny, CPU | tiny, GPU |",
        "| policy loss | -0.05 | -0.05 |",
        "| adapters after the update: share of their largest change | 0.3 |",
        "| 1.5B | 64 | 2,560 | 0.174 | 0.129 | 0.009 | 0.815 | 1.127 | 1,817 | 8.7 |",
        "| memory that sleeping frees, GiB | 22.1 |",
    ):
        assert line in lines


def test_an_engine_that_was_not_there_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = page({"part": "engine", "skipped": "vLLM is not installed"}, root, monkeypatch)
    assert "Not measured: vLLM is not installed." in lines
