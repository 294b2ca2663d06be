"""The loop's small decisions: which prompts, how strong a penalty, when to stop, what is kept."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.improve.base import ExperienceSource
from learner.improve.budget import Budget
from learner.improve.candidates import candidates, drop_candidates
from learner.improve.training import next_kl_coef, outgrown, replace_cut
from learner.improve_settings import PPOSettings
from learner.model.rollout import SampledAnswer, draw_generator, draw_seed, to_rollout
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import StepMetrics


def figures(**values: Any) -> StepMetrics:
    return StepMetrics(**{**{field.name: 0 for field in fields(StepMetrics)}, **values})


def test_every_prompt_once_before_any_again_and_a_seed_decides() -> None:
    prompts = [Prompt(f"c{i}", [i], 8) for i in range(5)]

    def drawn(seed: int) -> list[int]:
        engine: Any = None
        batches = ExperienceSource(engine, prompts, 0.85, seed).batches(3)
        return [prompt.token_ids[0] for _ in range(5) for prompt in next(batches)]

    first = drawn(0)
    assert [sorted(first[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert drawn(0) == first
    assert drawn(1) != first


def test_draws_of_two_rounds_and_two_steps_differ() -> None:
    assert len({draw_seed(seed, draw) for seed in range(3) for draw in range(1_000)}) == 3_000
    drawn = [torch.randperm(64, generator=draw_generator(seed, step)).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len(set(map(tuple, drawn))) == 4


def test_the_penalty_follows_the_kl() -> None:
    settings = PPOSettings(kl_coef=0.2, kl_horizon=100, episodes=10)
    budget = Budget(6.0, per_token=0.5)
    assert next_kl_coef([], settings, 0.1, budget) == 0.2
    assert next_kl_coef([figures(kl_coef=0.2, kl=0.2, length=60)], settings, 0.1, budget) == pytest.approx(0.204)
    # From the last step's weight, not from the first's.
    assert next_kl_coef(
        [figures(kl_coef=9.0), figures(kl_coef=0.4, kl=0.0, length=60)], settings, 0.1, budget
    ) == pytest.approx(0.392)
    # Answers of six tokens have half of the budget, and half of the target.
    assert next_kl_coef([figures(kl_coef=0.2, kl=0.05, length=6)], settings, 0.1, budget) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("length", "learning_rate", "approx_kl_stop"), [(1, 2e-4, 0.02), (64, 2e-4, 0.02), (256, 1e-4, 0.005)]
)
def test_a_step_moves_long_answers_as_far_as_short_ones(
    length: float, learning_rate: float, approx_kl_stop: float
) -> None:
    settings = PPOSettings(learning_rate=2e-4, approx_kl_stop=0.02, full_step_tokens=64).at_length(length)
    assert settings.learning_rate == pytest.approx(learning_rate, rel=1e-12)
    assert settings.approx_kl_stop == pytest.approx(approx_kl_stop, rel=1e-12)


def test_training_ends_when_uncertainty_grows_faster_than_the_score() -> None:
    # Score minus uncertainty: 0, 0.5, 0.4, 0.3; the best is two steps back.
    steps = [figures(score=s, uncertainty=u) for s, u in ((0.0, 0.0), (1.0, 0.5), (1.4, 1.0), (1.9, 1.6))]
    assert not outgrown([], 1)
    assert not outgrown(steps[:3], 1)
    assert outgrown(steps, 1)
    assert not outgrown(steps, 2)


def test_a_cut_answers_score_is_replaced_only_if_that_is_set() -> None:
    rollout = to_rollout(
        [SampledAnswer([1], [5, 2], [0.0, 0.0], "a", "stop"), SampledAnswer([1], [5, 6], [0.0, 0.0], "b", "length")]
    )
    scores = torch.tensor([0.5, 0.7])
    assert replace_cut(scores, rollout, None).tolist() == scores.tolist()
    assert replace_cut(scores, rollout, -1.0).tolist() == [0.5, -1.0]


def test_later_candidates_are_dropped(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        (tmp_path / f"step-{step:03d}").mkdir()
    drop_candidates(tmp_path, after=2)
    assert candidates(tmp_path) == [1, 2]
