"""Another model in the same data directory: what people voted on the first teaches the second, and one can go back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clients import Client
from clients.demo.voter import ask
from tests.e2e.conftest import live_server
from tests.e2e.small_rounds import TINY
from tests.e2e.tiny import CHARACTERS, save_tiny_model

pytestmark = pytest.mark.e2e


def rebase(data_dir: Path, model: Path) -> str:
    """Runs the command; returns its last line."""
    result = subprocess.run(
        [sys.executable, "-m", "learner.cli", "rebase", "--data-dir", str(data_dir), "--model", str(model)],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.splitlines()[-1]


def test_votes_outlive_the_model(tmp_path: Path, tiny_model: Path) -> None:
    data_dir, other_model = tmp_path / "data", tmp_path / "other"
    save_tiny_model(other_model, CHARACTERS[::-1])
    with live_server(data_dir, tiny_model) as live:
        with Client(live.address, user="voter") as client:
            TINY.vote(client)
            first = ask(client, "Who are you?", max_tokens=4)
            assert first.policy_version == "v0000"
            said = rebase(data_dir, other_model)
            assert said.startswith("v0001 is active instead of v0000. Restart ")
            assert f"with --model {other_model};" in said
            # What is loaded serves until then.
            live.hear(f"--model {other_model}")
            assert ask(client, "Still you?", max_tokens=4).policy_version == "v0000"
        assert live.stop() == 0

        live.model = str(other_model)
        live.start()
        with Client(live.address, user="voter") as client:
            assert ask(client, "Who are you?", max_tokens=4).policy_version == "v0001"
            # People's conversations and votes are there, as text.
            [turn] = client.conversation(first.conversation_id).turns
            assert (turn.message, turn.response.text) == ("Who are you?", first.text)
            report = TINY.run(data_dir)
            assert (report["state"], report["policy_version"]) == ("promoted", "v0002"), report["sentence"]
            votes = report["metrics"]["votes"]
            assert votes["train"] + votes["judge"] + votes["left_out"] == TINY.votes
            assert votes["left_out"] == 0
            assert ask(client, "And now?", max_tokens=4).policy_version == "v0002"
        assert rebase(data_dir, tiny_model).startswith("v0000 is active instead of v0002. Restart ")
        assert live.stop() == 0

        live.model = str(tiny_model)
        live.start()
        with Client(live.address, user="voter") as client:
            assert ask(client, "Back again?", max_tokens=4).policy_version == "v0000"
