"""Texts and tokens of a round: what people read of a prompt, and what the model reads of a text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from learner.judging import _promising
from learner.workspace import Workspace
from tests.learner.conftest import EOS


@pytest.fixture
def work(model_directory: Path) -> Any:
    """A workspace as far as its tokenizer; the chat template is `w1 CONTENT ... w3`."""
    made: Any = SimpleNamespace(reference_directory=model_directory)
    made._tokenizer = Workspace._tokenizer.func(made)  # type: ignore[attr-defined]
    made.encode_chat = lambda messages: Workspace.encode_chat(made, messages)
    return made


def test_a_corrected_text_gets_the_eos_that_answers_end_with(work: Any) -> None:
    assert Workspace.encode(work, "w7 w8") == [7, 8, EOS]


def test_a_conversation_is_encoded_in_the_chat_template(work: Any) -> None:
    assert work.encode_chat([{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]) == [
        1,
        7,
        1,
        8,
        3,
    ]


def test_people_read_a_prompt_without_the_templates_ends(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two words that the small vocabulary has, so that the two probes differ.
    work.encode_chat = lambda messages: {"Why?": [1, 20, 3], "No.": [1, 21, 3]}[messages[0]["content"]]
    work._template_ends = Workspace._template_ends.func(work)  # type: ignore[attr-defined]
    assert Workspace.decode(work, [1, 7, 8, 3]) == "w7 w8"
    assert Workspace.decode(work, [9, 7, 8, 3]) == "w9 w7 w8 w3"  # another template's


@pytest.mark.parametrize(
    ("steps", "expected"),
    [([1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 6, 8, 9]), ([2, 4, 6], [2, 4, 6]), ([5], [5])],
)
def test_candidates_to_judge_are_dense_near_the_end(steps: list[int], expected: list[int]) -> None:
    work: Any = SimpleNamespace(settings=SimpleNamespace(gate=SimpleNamespace(candidates=4)))
    assert _promising(work, steps) == expected
