"""Whatever the server accepted: a round either works or ends with a sentence, and counts what it left out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import learner.round.gate.gate_stage as judging
import learner.round.workspace as workspace
from learner.progress import Stages
from learner.round.run import run_once
from server.store.chats.records import Generation, Span
from server.store.store import Store
from tests.learner import rounds
from tests.learner.rounds import TinyEngine, passing

# The number of positions of the tiny model.
POSITIONS = 128

given_things = st.fixed_dictionaries(
    {
        # Tokens of the prompt and of the answer; some fill the context to the last token, some exceed it.
        "prompt": st.sampled_from([1, 6, 64, POSITIONS - 1, POSITIONS, POSITIONS + 1, 3 * POSITIONS]),
        "answer": st.sampled_from([0, 1, 12, POSITIONS - 64, POSITIONS]),
        "max_tokens": st.sampled_from([1, 12, POSITIONS - 64, POSITIONS, 512]),
        "reason": st.sampled_from(["stop", "length", "cancelled", "error"]),
        "text": st.text(max_size=20) | st.sampled_from(["", "w7 " * 4000, "<s> w2 w2", "\x00\x1b[2J", "𐀀" * 100]),
    }
)


def give(store: Store, number: int, thing: dict[str, Any]) -> None:
    """An answer of that kind, with a thumb and a correction on it; and a demonstration."""
    user = f"user{number % 3}"
    conversation = store.conversations.create(user, thing["text"] or "?")
    response = store.responses.begin(
        user, conversation, message=thing["text"] or "?", replica_id="r", policy_version="v0000",
        prompt_token_ids=[5 + number % 30] * thing["prompt"], temperature=0.85, max_tokens=thing["max_tokens"],
        seed=None,
    )  # fmt: skip
    tokens = [7] * thing["answer"]
    spans = [Span(0, len(tokens), "v0000")] if tokens else []
    store.responses.finish(
        response, Generation(tokens, [-1.0] * len(tokens), thing["text"] or "w7", thing["reason"], spans)
    )
    store.feedback.submit_thumb(user, response, up=bool(number % 2))
    store.feedback.submit_correction(user, response, thing["text"])
    store.feedback.submit_demonstration(user, [{"role": "assistant", "content": thing["text"]}] * 2)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(things=st.lists(given_things, min_size=1, max_size=40))
def test_a_round_works_or_ends_with_a_sentence(
    voted: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, things: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(workspace, "RolloutEngine", TinyEngine)
    monkeypatch.setattr(judging, "decide", passing)
    data_dir = tmp_path_factory.mktemp("whatever") / "data"
    shutil.copytree(voted, data_dir)
    store = Store.open(data_dir)
    for number, thing in enumerate(things):
        give(store, number, thing)
    store.close()
    report = run_once(
        rounds.settings(data_dir, policy={"lora_rank": 4}, ppo={"steps": 1, "episodes": 8}), Stages(Console(quiet=True))
    )
    assert report.state in ("promoted", "rejected")
    assert "\n" not in report.sentence
    unread = sum(not thing["answer"] or thing["prompt"] + thing["answer"] > POSITIONS for thing in things)
    # Left out are the thumb on each such answer, its correction if the conversation trains, and other corrections that
    # are too long or change nothing.
    assert report.metrics.votes.left_out >= unread
