"""The sentences of rounds without a result say what is missing, in numbers."""

import math

import pytest

from learner.round.preconditions import no_candidate, too_few_prompts, too_little
from learner.round.prompts import Prompts
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import EndedBy, Improvement, SignalTest, StepMetrics
from tests.round_metrics import filled

PROMPT = Prompt("conv", [1], 8)


def test_too_few_prompts_on_either_side() -> None:
    assert too_few_prompts(Prompts([PROMPT] * 10, [PROMPT] * 10)) is None
    assert "9 prompts to train on and 10 held out" in str(too_few_prompts(Prompts([PROMPT] * 9, [PROMPT] * 10)))
    assert "10 prompts to train on and 9 held out" in str(too_few_prompts(Prompts([PROMPT] * 10, [PROMPT] * 9)))


def test_too_little_signal_and_none_at_all() -> None:
    assert "accuracy 0.55, where shuffled votes give 0.51 (p = 0.240)" in too_little(SignalTest(0.55, 0.51, 0.24))
    assert "all are ties or both-bad" in too_little(SignalTest(math.nan, math.nan, 1.0))


@pytest.mark.parametrize(
    ("ended_by", "said"), [("kl_budget", "KL"), ("uncertainty", "more votes"), ("steps", "save_every")]
)
def test_training_without_a_candidate(ended_by: EndedBy, said: str) -> None:
    sentence = no_candidate(Improvement([filled(StepMetrics)] * 2, [], ended_by))
    assert sentence.startswith("Training ended at step 2 without a candidate: ")
    assert said in sentence
