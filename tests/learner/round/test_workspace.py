"""Texts and tokens of a round: prompts as readable text, and texts as tokens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from learner.round.gate.gate_stage import promising
from learner.round.workspace import Workspace
from learner.settings import GateSettings, LearnerSettings
from server.shared.model.text import ChatText
from server.store.learning.round_metrics import Improvement, StepMetrics
from tests.learner.conftest import EOS
from tests.round_metrics import filled


@pytest.fixture
def work(model_directory: Path) -> Any:
    """A workspace with only a tokenizer; the chat template is `w1 CONTENT ... w3`."""
    made: Any = SimpleNamespace(
        text=ChatText.load(model_directory), round=SimpleNamespace(create_time=0.0), settings=LearnerSettings()
    )
    made.encode_chat = lambda messages: Workspace.encode_chat(made, messages)
    return made


def test_a_corrected_text_gets_the_eos_that_answers_end_with(work: Any) -> None:
    assert work.text.answer("w7 w8") == [7, 8, EOS]


def test_a_conversation_is_encoded_in_the_chat_template(work: Any) -> None:
    assert work.encode_chat([{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]) == [
        1,
        7,
        1,
        8,
        3,
    ]


def test_what_nobody_asked_begins_with_the_services_system_prompt(work: Any) -> None:
    work.settings = LearnerSettings(system_prompt="w9")
    assert work.encode_chat([{"role": "user", "content": "w7"}]) == [1, 9, 1, 7, 3]
    assert work.encode_chat([{"role": "system", "content": "w8"}, {"role": "user", "content": "w7"}]) == [1, 8, 1, 7, 3]


def test_a_readable_prompt_has_no_template_ends(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two words that the small vocabulary has, so that the two probes differ.
    work.encode_chat = lambda messages: {"Why?": [1, 20, 3], "No.": [1, 21, 3]}[messages[0]["content"]]
    work._template_ends = Workspace._template_ends.func(work)  # type: ignore[attr-defined]
    assert Workspace.decode(work, [1, 7, 8, 3]) == "w7 w8"
    assert Workspace.decode(work, [9, 7, 8, 3]) == "w9 w7 w8 w3"  # another template's


@pytest.mark.parametrize(
    ("steps", "kl", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0.3, 0.8, 1.4, 2.0, 2.6, 3.2, 3.8, 4.4], [2, 6, 9]),
        ([2, 4, 6], [0, 0.5, 1, 2, 3, 4], [2, 4, 6]),
        ([5], [0, 1, 2, 3, 4], [5]),
        ([1, 2, 3, 4, 5], [0, 2.0, 3.0, 4.2, 5.0], [1, 2, 5]),
        # One update, of which nothing is known.
        ([1], [0.0], [1]),
        # If the penalty holds the KL, all candidates near the end are the same.
        ([1, 2, 3, 4, 5, 6, 7, 8], [0, 1.5, 2.9, 3.4, 3.5, 3.6, 3.5, 3.5, 3.6], [1, 8]),
    ],
)
def test_candidates_to_judge_are_dense_near_the_end_and_not_alike(
    steps: list[int], kl: list[float], expected: list[int]
) -> None:
    measured = [filled(StepMetrics, step=number, kl=each) for number, each in enumerate(kl)]
    assert promising(Improvement(measured, steps, "steps"), GateSettings()) == expected
