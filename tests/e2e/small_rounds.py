"""Small rounds of the real learner, and votes for them. The gate accepts almost anything, since a few votes prove
nothing; its rejections are tested in tests/learner.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients import Client
from clients.demo.questions import questions
from clients.demo.voter import TASTES, Taste, Voter
from server.settings import DEFAULT_MODEL

SECONDS = 480
LENIENT = {
    # How long a killed learner keeps the next one waiting.
    "PREFLOOP_LEASE_SECONDS": "3",
    # Large, unrestrained steps, for a shift that few prompts can show.
    "PREFLOOP_PPO__KL_COEF": "0.01",
    "PREFLOOP_POLICY__KL_BUDGET": "100",
    "PREFLOOP_POLICY__KL_PER_TOKEN": "100",
    "PREFLOOP_REWARD__REFERENCE_ANSWERS": "16",
    "PREFLOOP_GATE__SIGNAL_P": "1",
    "PREFLOOP_GATE__PROMPTS": "32",
    "PREFLOOP_GATE__REFITS": "100",
    "PREFLOOP_GATE__CONFIDENCE": "0.501",
    "PREFLOOP_GATE__CANARY": "off",
    "PREFLOOP_GATE__LENGTH_RANGE": "[0.01, 4]",
    "PREFLOOP_GATE__EMPTY_MARGIN": "1",
    "PREFLOOP_GATE__REPETITION_MARGIN": "1",
    "PREFLOOP_REVIEW__ACTIVE_PAIRS": "0",
}


@dataclass(frozen=True)
class SmallRound:
    """What people like about a model's answers, in how many votes they say it, and the settings of a round."""

    taste: Taste
    max_tokens: int
    votes: int
    steps: int
    settings: dict[str, str]

    def vote(self, client: Client, first: int = 0, count: int | None = None) -> None:
        """Votes on `count` answers, by default as many as a round needs, to the questions from number `first` on."""
        count = count or self.votes
        asked = questions(0)[first : first + count]
        voter = Voter(self.taste, flip_rate=0.0, max_tokens=self.max_tokens, seed=0)
        cast = voter.vote_on(client, asked, concurrency=16, on_vote=lambda: None)
        assert cast.a_or_b + cast.ties == count

    def environment(self, **settings: str) -> dict[str, str]:
        steps = {"PREFLOOP_PPO__STEPS": str(self.steps)}
        return {**os.environ, **LENIENT, **steps, **self.settings, **settings}

    def run(self, data_dir: Path, name: str = "run-once", **settings: str) -> Any:
        """Runs `learner run-once`, or another command that runs a round; returns its report."""
        result = subprocess.run(
            command(data_dir, name), capture_output=True, text=True, timeout=SECONDS, check=False,
            env=self.environment(**settings),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.splitlines()[-1])


def command(data_dir: Path, name: str = "run-once") -> list[str]:
    return [sys.executable, "-m", "learner.cli", name, "--json", "--data-dir", str(data_dir)]


DEFAULT = SmallRound(
    taste=TASTES["short"],
    max_tokens=32,
    votes=150,
    steps=5,
    settings={
        "PREFLOOP_PPO__EPISODES": "16",
        "PREFLOOP_PPO__SAVE_EVERY": "5",
        "PREFLOOP_PPO__LEARNING_RATE": "6e-4",
    },
)
# Its characters mean nothing, so people have a taste for some of them; and it takes more steps to change.
TINY = SmallRound(
    taste=Taste("more small letters", lambda answer: sum(map(str.islower, answer.text))),
    max_tokens=16,
    votes=300,
    steps=24,
    settings={
        "PREFLOOP_PPO__EPISODES": "64",
        "PREFLOOP_PPO__SAVE_EVERY": "12",
        "PREFLOOP_PPO__LEARNING_RATE": "1e-3",
        "PREFLOOP_PPO__APPROX_KL_STOP": "0.5",
        "PREFLOOP_PPO__PATIENCE": "24",
        # Its few words differ by little, and training makes it sure of them: in bfloat16 rounding would be 0.4 nats.
        "PREFLOOP_DTYPE": "float32",
    },
)


def small_round(model: str) -> SmallRound:
    """The round of the default model, or of a tiny one."""
    return DEFAULT if model == DEFAULT_MODEL else TINY
