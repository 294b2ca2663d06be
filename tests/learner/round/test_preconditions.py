"""The sentences of rounds without a result say what is missing, in numbers."""

import math
from dataclasses import replace

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
    weak = filled(SignalTest, accuracy=0.55, p_value=0.24, level=0.01, votes=60, conversations=60, enough_votes=1234)
    assert too_little(replace(weak, enough_votes=163)) == (
        "The votes carry too little signal to learn from: p = 0.240, and at most 0.010 is needed (cross-validated "
        "accuracy 0.55). About 170 such votes would probably suffice; there are 60. Nothing was changed."
    )
    assert "It cannot be estimated how many votes would suffice; there are 60." in too_little(weak)
    few = replace(weak, conversations=7)
    assert "They are in 7 conversations, too few for any test: vote in more of them." in too_little(few)
    assert "too few" not in too_little(replace(weak, conversations=8))
    assert "all are ties, both-bad or corrections" in too_little(replace(weak, accuracy=math.nan))


@pytest.mark.parametrize(
    ("ended_by", "said"), [("kl_budget", "KL"), ("uncertainty", "more votes"), ("steps", "save_every")]
)
def test_training_without_a_candidate(ended_by: EndedBy, said: str) -> None:
    sentence = no_candidate(Improvement([filled(StepMetrics)] * 2, [], ended_by))
    assert sentence.startswith("Training ended at step 2 without a candidate: ")
    assert said in sentence


def test_training_that_starts_beyond_the_budget() -> None:
    assert no_candidate(Improvement([], [], "kl_budget")) == (
        "Training ended at step 0 without a candidate: the active version, which it starts from, is beyond the KL "
        "budget; let rounds start from the reference. Nothing was changed."
    )
