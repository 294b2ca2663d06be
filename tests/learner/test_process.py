"""The GPU that the learner's process sees."""

import os

import pytest

import learner.process as process
from learner.settings import LearnerSettings


@pytest.mark.parametrize(
    ("gpu", "before", "after"),
    [
        (0, None, "0"),
        (1, None, "1"),
        # Numbers count what was visible before.
        (1, "2,3", "3"),
        (0, "GPU-5f, GPU-7a", "GPU-5f"),
        (2, "2,3", "-1"),
        (0, "", "-1"),
    ],
)
def test_one_gpu_is_left_visible(gpu: int, before: str | None, after: str) -> None:
    assert process.one_visible(gpu, before) == after


@pytest.mark.parametrize(("device", "seen"), [("auto", "4,5"), ("cpu", "4,5"), ("cuda", "4,5"), ("cuda:1", "5")])
def test_a_chosen_gpu_hides_the_others_once(device: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "4,5"})
    process._show_only.cache_clear()
    # The command sets the environment, and so does the engine.
    for _ in range(2):
        process.set_environment(LearnerSettings.from_values({"learner_device": device}))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    process._show_only.cache_clear()
