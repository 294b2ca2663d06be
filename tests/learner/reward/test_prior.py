"""What imported preferences say is used as far as it predicts people's own votes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.model.features import FeatureSpec
from learner.reward.likelihood import A, B
from learner.reward.linear_heads import VoteTensors
from learner.reward.linear_reward_model import LinearRewardModel, evaluate
from learner.reward.prior import ImportedPreferences, Prior, direction
from learner.reward.standardiser import standardiser, usual_mix
from learner.settings import RewardSettings

SPEC, WIDTH = FeatureSpec(meaning=(1,)), 60
SETTINGS = RewardSettings(fold_repeats=2)


def drawn(count: int, taste: Tensor, seed: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Features (2 * count, F) of random answers, and choices by a taste (F,)."""
    features = torch.randn(2 * count, WIDTH, generator=torch.Generator().manual_seed(seed))
    liked = features @ taste
    return features, [(2 * i, 2 * i + 1, A if liked[2 * i] > liked[2 * i + 1] else B) for i in range(count)]


def imported(taste: Tensor, count: int = 400) -> ImportedPreferences:
    """The chosen answer of each pair comes first."""
    features, choices = drawn(count, taste, seed=1)
    rows = [row for a, b, outcome in choices for row in ((a, b) if outcome == A else (b, a))]
    return ImportedPreferences(features[rows])


def taste(seed: int) -> Tensor:
    values = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    values[-1] = 0.0
    return values


def fitted(
    votes: int, make_votes: Callable[..., VoteTensors], given: ImportedPreferences | None
) -> tuple[LinearRewardModel, float]:
    """A model of votes by the first taste, and its accuracy on others."""
    features, choices = drawn(votes, taste(0), seed=2)
    model = LinearRewardModel.fit(
        features, make_votes(choices), SPEC, SETTINGS, torch.Generator().manual_seed(0), given
    )
    unseen, others = drawn(1000, taste(0), seed=3)
    return model, evaluate(model, unseen, make_votes(others)).accuracy


def test_others_of_the_same_taste_help(make_votes: Callable[..., VoteTensors]) -> None:
    without, alone = fitted(40, make_votes, None)
    model, accuracy = fitted(40, make_votes, imported(taste(0)))
    assert (without.prior_weight, model.prior_weight) == (0.0, 3.0)
    assert (alone, accuracy) == (pytest.approx(0.68, abs=0.05), pytest.approx(0.9, abs=0.05))


def test_others_of_another_taste_are_not_followed(make_votes: Callable[..., VoteTensors]) -> None:
    without, _ = fitted(40, make_votes, None)
    model, _ = fitted(40, make_votes, imported(taste(9)))
    assert model.prior_weight == 0.0
    # It is the very model that there would be without them.
    assert torch.equal(model.weights, without.weights)


def test_what_others_say_is_a_direction_of_weights() -> None:
    """Its score is linear in the same features, so nothing but the fit knows of it."""
    given = imported(taste(0))
    scaling = standardiser(given.features, SPEC, usual_mix(SPEC))
    standard = scaling(given.features)
    said = direction(given, scaling, SETTINGS, torch.Generator().manual_seed(0))
    scores = standard @ said
    assert float((scores[0::2] > scores[1::2]).float().mean()) > 0.9
    prior = Prior.of(said, standard, 3.0)
    assert float((standard @ prior.direction).std(correction=0)) == pytest.approx(3.0, abs=1e-4)
    # A direction in which no voted answer differs says nothing.
    assert Prior.of(said, torch.zeros(4, WIDTH), 3.0).direction.abs().max() == 0.0


def test_a_single_conversation_cannot_say_how_much_others_count(make_votes: Callable[..., VoteTensors]) -> None:
    features, choices = drawn(3, taste(0), seed=2)
    votes = make_votes(choices)
    votes = type(votes)(**{**vars(votes), "choice_group": torch.zeros(3, dtype=torch.long)})
    model = LinearRewardModel.fit(features, votes, SPEC, SETTINGS, torch.Generator().manual_seed(0), imported(taste(0)))
    assert model.prior_weight == 0.0
