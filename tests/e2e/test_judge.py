"""A machine judge on a real second vLLM server."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from learner.settings import LearnerSettings
from server.reference.reference import prepare_reference
from server.store.chats.records import Generation, Span
from server.store.store import Store

START_SECONDS, STOP_SECONDS, JUDGE_SECONDS = 300, 60, 300
PAIRS = 6

pytestmark = pytest.mark.e2e


@contextmanager
def vllm_server(model: Path) -> Iterator[str]:
    """vLLM's own OpenAI-compatible server; the URL of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "judge", "--enforce-eager", "--max-model-len", "1024"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen(
        [*command, "--dtype", "float32"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        assert process.stdout
        said = []
        for line in process.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(said[-40:]))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=STOP_SECONDS)


def compared(data_dir: Path) -> None:
    """Comparisons of a good answer with a bad one, half of them the other way round."""
    good, bad = "Because air scatters blue light more than red light.", "No."
    store = Store.open(data_dir)
    store.policies.register_reference()
    for number in range(3 * PAIRS):
        conversation = store.conversations.create("ann", "Why is the sky blue?")
        _, *responses = store.responses.begin_comparison(
            "ann", conversation, message="Why is the sky blue?", replica_id="here", policy_versions=("v0000", "v0000"),
            prompt_token_ids=[1, 2], temperatures=(1.0, 0.7), max_tokens=8, seeds=(None, None),
        )  # fmt: skip
        texts = (good, bad) if number % 2 else (bad, good)
        for response, text in zip(responses, texts, strict=True):
            store.responses.finish(response, Generation([5], [-0.5], text, "stop", [Span(0, 1, "v0000")]))
    store.close()


@pytest.mark.timeout(START_SECONDS + JUDGE_SECONDS + STOP_SECONDS)
def test_a_model_on_another_server_judges(model: str, tmp_path: Path) -> None:
    served = Path(model)
    if not served.is_dir():
        served = prepare_reference(tmp_path / "judge", model, print, dtype="float32")
    compared(tmp_path)
    with vllm_server(served) as url:
        environment = {
            **os.environ,
            "PREFLOOP_JUDGE__URL": url,
            "PREFLOOP_JUDGE__MODEL": "judge",
            "PREFLOOP_JUDGE__PAIRS": str(PAIRS),
        }
        command = [sys.executable, "-m", "learner.cli", "judge", "--data-dir", str(tmp_path)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=JUDGE_SECONDS, check=False
        )
    assert done.returncode == 0, done.stderr
    said = re.match(rf"{PAIRS} comparisons judged \(([\d,]+) tokens\)\.", done.stdout)
    assert said, done.stdout
    assert int(said[1].replace(",", "")) > 2 * PAIRS * 50
    settings = LearnerSettings(judge={"url": url, "model": "judge"})
    store = Store.open(tmp_path)
    assert len(store.machine_choices.all(settings.judge.name)) == PAIRS
    store.close()
