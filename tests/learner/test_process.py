"""The learner's process: the GPU that it sees, and its memory."""

import os
import subprocess
import sys

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


# Twenty-one blocks that are freed, with small ones between them that are kept. Prints the mebibytes that remain.
ALLOCATE = """
import ctypes, sys
from learner import process

for name in sys.argv[1:]:
    getattr(process, name)()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def resident():
    # statm counts per processor, and may miss some of the newest pages.
    [line] = [line for line in open("/proc/self/smaps_rollup") if line.startswith("Rss")]
    return int(line.split()[1]) / 1024


before = resident()
blocks = []
for _ in range(21):
    blocks.append(c.malloc(4 * 2**20))
    ctypes.memset(blocks[-1], 1, 4 * 2**20)
    c.malloc(100)
assert resident() - before >= 80
for block in blocks:
    c.free(block)
print(f"{resident() - before:.0f}")
"""


@pytest.mark.parametrize(
    ("calls", "least", "most"),
    [(["keep_freed_memory"], 75, 85), (["keep_freed_memory", "return_large_blocks"], 0, 3)],
)
def test_freed_memory_is_kept_unless_memory_is_short(calls: list[str], least: int, most: int) -> None:
    said = subprocess.run(
        [sys.executable, "-c", ALLOCATE, *calls], capture_output=True, text=True, timeout=60, check=True
    )
    assert least <= int(said.stdout) <= most
