"""Models of many families in the real engine: it answers as the trainer computes, also after weights were pushed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import slow

pytestmark = pytest.mark.e2e

# A scale on the logits, a cap, a mixture, a model that vLLM has no code of its own for, and one matrix for words in and
# out, which the default model has, too.
SAMPLE = ["granite", "gemma2", "mixtral", "arcee", "gpt2"]
REST = [
    "bloom", "cohere", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "falcon_h1", "glm4", "llama", "olmoe", "phi",
    "phi3", "qwen2_moe", "qwen3", "qwen3_moe",
]  # fmt: skip


PATCHED = """
import server.engine.vllm_process
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
print(hasattr(RotaryEmbedding.forward_cpu, "__wrapped__"))
"""


def test_the_servers_engine_rotates_every_head_too(root: Path) -> None:
    command = [sys.executable, "-c", PATCHED]
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100).stdout == "True\n"


@pytest.mark.parametrize("family", [*SAMPLE, *map(slow, REST)])
def test_engine_and_trainer_are_one_policy(family: str, tmp_path: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.families.engine", family, str(tmp_path)],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["served"], found["lora"], found["full"]) < 2e-3, found
    assert found["moved"] > 0.5
