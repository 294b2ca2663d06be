"""The learner's own engine: prompts too long for one step, a seed for each answer, and stop sequences."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

SAMPLE = """
import sys
from pathlib import Path
from learner.model.rollout import RolloutEngine
from learner.settings import LearnerSettings
from server.store.chats.records import Prompt

engine = RolloutEngine(Path(sys.argv[1]), LearnerSettings(), "float32", 1024)
prompts = [Prompt(str(n), [1, *[3 + (n + i) % 90 for i in range(900)], 0], 8) for n in range(48)]
together = engine.sample(prompts, 7)
alone = engine.sample(prompts[:1], 7)
whole = engine.sample([Prompt("", [1, 5, 6], 64)], 3)[0]
stop = whole.text[9:14]
[stopped] = engine.sample([Prompt("", [1, 5, 6], 64, stop=(stop,))], 3)
count = len(stopped.token_ids)
right = stopped.text == whole.text[: whole.text.index(stop)], stopped.token_ids == whole.token_ids[:count], count < 14
print("stopped", stopped.finish_reason, *right)
print("found", together[0].token_ids == alone[0].token_ids, len(together), len({str(s.token_ids) for s in together}))
"""


def test_long_prompts_seeds_and_stop_sequences(tiny_model: Path) -> None:
    # 43,000 tokens are more than vLLM processes in one step.
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, str(tiny_model)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.splitlines()[-2:] == ["stopped stop_sequence True True True", "found True 48 48"], done.stderr[
        -2000:
    ]
