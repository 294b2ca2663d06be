"""Fitting heads: the optimum, folds, and what votes cannot change."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from learner.reward.evaluation import (
    agreement,
    cross_validate,
    expected_calibration_error,
    fold_of,
    held_out,
)
from learner.reward.likelihood import BOTH_BAD, TIE, A, B
from learner.reward.linear_heads import VoteTensors, bootstrap, fit, span_basis
from learner.reward.vote_weights import vote_weights

MakeVotes = Callable[..., VoteTensors]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def taste(make_votes: MakeVotes, n: int = 120, noise: float = 0.1, width: int = 20) -> tuple[torch.Tensor, VoteTensors]:
    """n comparisons between random answers, decided by the first feature, `noise` of them flipped."""
    generator = seeded(1)
    features = torch.randn(2 * n, width, generator=generator)
    better = features[::2, 0] > features[1::2, 0]
    flipped = torch.rand(n, generator=generator) < noise
    return features, make_votes([(2 * i, 2 * i + 1, A if w else B) for i, w in enumerate((better ^ flipped).tolist())])


def test_one_pair_meets_its_closed_form(make_votes: MakeVotes) -> None:
    # One vote for 1 over 0, penalty 1: -log s(w - eta) + w^2 / 2 has its minimum where w = 1 - s(w - eta).
    head = fit(torch.tensor([[1.0], [0.0]]), make_votes([(0, 1, A)]), torch.tensor([1.0]), 0.0)
    w, eta = head.weights.item(), head.eta().item()
    assert w > 0
    assert w == pytest.approx(1 / (1 + torch.tensor(w - eta).exp().item()), abs=1e-3)


def test_a_thumb_up_raises_and_a_thumb_down_lowers(make_votes: MakeVotes) -> None:
    features = torch.eye(2)
    head = fit(features, make_votes(thumbs=[(0, 1, 0), (1, -1, 0)]), torch.tensor([0.1]), 0.0)
    up, down = head.scores(features)[0].tolist()
    assert up > 0.5
    assert down < -0.5
    assert up == pytest.approx(-down, abs=1e-3)


def test_a_harsh_user_is_a_bar_not_a_bad_answer(make_votes: MakeVotes) -> None:
    # User 1 gives only thumbs down, user 0 only thumbs up, on answers with the same features.
    features = torch.ones(1, 1)
    votes = make_votes(thumbs=[(0, 1, 0)] * 8 + [(0, -1, 1)] * 8, users=2)
    head = fit(features, votes, torch.tensor([1.0]), 0.0)
    assert abs(head.scores(features).item()) < 0.05
    assert head.user_bars[0, 0] < -1
    assert head.user_bars[0, 1] > 1


def test_ties_widen_and_both_bad_raises_its_bar(make_votes: MakeVotes) -> None:
    features = torch.eye(2)
    penalty = torch.tensor([1.0])
    decided = fit(features, make_votes([(0, 1, A), (1, 0, A)] * 10), penalty, 0.0)
    tied = fit(features, make_votes([(0, 1, TIE), (1, 0, TIE)] * 10), penalty, 0.0)
    bad = fit(features, make_votes([(0, 1, BOTH_BAD), (1, 0, BOTH_BAD)] * 10), penalty, 0.0)
    assert decided.eta().item() < 0.2
    assert tied.eta().item() > 1
    assert bad.bad_bar.item() > 1 > -1 > tied.bad_bar.item()


def test_the_temperature_explains_votes_and_the_score_excludes_it(make_votes: MakeVotes) -> None:
    # The cooler answer always wins; the feature says nothing.
    features = torch.randn(80, 3, generator=seeded())
    votes = make_votes([(2 * i, 2 * i + 1, A) for i in range(40)], temperature_difference=[-0.3] * 40)
    head = fit(features, votes, torch.tensor([10.0]), 0.0)
    assert head.temperature.item() < -1
    assert head.scores(features).std().item() < 0.3


def test_the_span_has_the_same_optimum_as_all_features(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes, n=12, width=60)
    basis = span_basis(features)
    assert basis.shape == (60, 24)
    whole = fit(features, votes, torch.tensor([1.0]), 0.05, max_iterations=500)
    reduced = fit(features @ basis, votes, torch.tensor([1.0]), 0.05, max_iterations=500)
    assert torch.allclose(whole.scores(features), reduced.scores(features @ basis), atol=2e-3)


def test_many_heads_at_once_are_the_heads_one_by_one(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    penalties = torch.tensor([0.3, 3.0, 30.0])
    together = fit(features, votes, penalties, 0.05)
    for row, penalty in enumerate(penalties):
        alone = fit(features, votes, penalty[None], 0.05)
        assert torch.allclose(together.weights[row], alone.weights[0], atol=5e-3)


def test_the_fit_survives_scores_that_overflow_an_exponential(make_votes: MakeVotes) -> None:
    features = 1e4 * torch.randn(40, 2, generator=seeded())
    head = fit(
        features, make_votes([(2 * i, 2 * i + 1, TIE if i % 5 else A) for i in range(20)]), torch.tensor([1e-6]), 0.0
    )
    assert all(torch.isfinite(value).all() for value in vars(head).values())


def test_cross_validation_finds_the_taste_and_holds_conversations_together(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    result = cross_validate(features, votes, torch.tensor([1.0, 10.0]), 0.05, fold_of(votes, 5, seeded()))
    assert (result.accuracy > 0.75).all()
    # Every vote twice, once in each of two conversations of the same fold: nothing can leak.
    fold = fold_of(votes, 5, seeded())
    assert torch.bincount(fold).tolist() == [24] * 5


def test_shuffled_order_of_votes_changes_nothing(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    order = torch.randperm(120, generator=seeded(5))
    moved = replace(votes, a=votes.a[order], b=votes.b[order], outcome=votes.outcome[order])
    first, second = (fit(features, v, torch.tensor([1.0]), 0.05).weights for v in (votes, moved))
    assert torch.allclose(first, second, atol=1e-3)


def test_exchanging_the_slots_changes_nothing(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    exchanged = replace(votes, a=votes.b, b=votes.a, outcome=1 - votes.outcome)
    first, second = (fit(features, v, torch.tensor([1.0]), 0.05).weights for v in (votes, exchanged))
    assert torch.allclose(first, second, atol=1e-3)


def test_bootstrap_refits_scatter_around_the_fit(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    point = fit(features, votes, torch.tensor([3.0]), 0.05).weights[0, 0]
    refits = bootstrap(features, votes, 3.0, 0.05, 50, seeded()).weights[:, 0]
    assert refits.mean().item() == pytest.approx(point.item(), rel=0.25)
    assert 0.02 < (refits.std() / point).item() < 0.5


def test_held_out_figures(make_votes: MakeVotes) -> None:
    features = torch.tensor([[2.0], [0.0], [1.0], [0.0]])
    head = fit(features, make_votes([(0, 1, A)]), torch.tensor([1.0]), 0.0)
    head = replace(head, weights=torch.tensor([[1.0]]))
    # Right by 2, wrong by 1, and a tie that does not count. The longer one wins once out of twice.
    votes = make_votes([(0, 1, A), (2, 3, B), (0, 2, TIE)])
    votes = replace(votes, temperature_difference=torch.tensor([0.3, -0.3, 0.3]))
    # Lengths e^1.2 and e^1 are alike (a fifth apart), e^3 and e^1 are not.
    figures = held_out(head, features, votes, torch.tensor([3.0, 1.0, 1.2, 1.0]))
    assert (figures.votes, figures.accuracy, figures.longer_wins) == (2, 0.5, 0.5)
    # The first was hotter and won, the second was cooler and lost.
    assert figures.hotter_wins == 1.0
    assert (figures.matched_votes, figures.matched_accuracy) == (1, 0.0)
    assert figures.length_correlation == pytest.approx(1.0)
    assert figures.nll == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-5)
    # Confidence .880797 and right, .731059 and wrong, in separate bins.
    assert figures.ece == pytest.approx((0.119203 + 0.731059) / 2, abs=1e-5)


def test_calibration_cancels_within_a_bin_only() -> None:
    confidence, correct = torch.tensor([0.71, 0.71, 0.71, 0.71]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.04, abs=1e-6)


def test_agreement() -> None:
    delta = torch.tensor([1.0, 1.0, 0.0, 1.0])
    found = agreement(delta, torch.tensor([A, B, A, TIE]))
    assert found[:3].tolist() == [1.0, 0.0, 0.5]
    assert found[3].isnan()


def test_old_votes_count_less_but_not_zero() -> None:
    weights = vote_weights(torch.tensor([0.0, 90, 180, 9000]), torch.zeros(4, dtype=torch.long), 90, 0.1, 0.05)
    assert weights.tolist() == pytest.approx([1, 0.5, 0.25, 0.1], abs=1e-6)


@pytest.mark.parametrize(
    ("voters", "share"), [(1, 1.0), (2, 0.98), (3, 2 / 3), (10, 0.2), (19, 2 / 19), (20, 0.1), (60, 0.05)]
)
def test_a_users_share_is_capped_for_any_number_of_voters(voters: int, share: float) -> None:
    users = torch.tensor([0] * 490 + [user for user in range(1, voters) for _ in range(10)])
    weights = vote_weights(torch.zeros(len(users)), users, 90, 0.1, 0.05)
    assert weights[users == 0].sum().item() / weights.sum().item() == pytest.approx(share, abs=1e-4)
    assert weights[users != 0].tolist() == pytest.approx([1.0] * (10 * (voters - 1)), abs=1e-4)


def test_a_users_share_is_capped_at_twice_an_equal_one() -> None:
    users = torch.tensor([0] * 61 + list(range(1, 40)))
    weights = vote_weights(torch.zeros(100), users, 90, 0.1, 0.05)
    assert weights[users == 0].sum().item() / weights.sum().item() == pytest.approx(0.05, abs=1e-4)
    assert weights[users == 1].item() == pytest.approx(1.0, abs=1e-4)
    # Twenty users with similar numbers of votes are at the cap, but nobody has twice an equal share.
    users = torch.tensor([0] * 11 + list(range(1, 19)) * 10 + [19])
    assert vote_weights(torch.zeros(192), users, 90, 0.1, 0.05).tolist() == [1.0] * 192
    # One of them with half of all votes is held to a tenth.
    users = torch.tensor([0] * 190 + list(range(1, 20)) * 10)
    weights = vote_weights(torch.zeros(380), users, 90, 0.1, 0.05)
    assert weights[users == 0].sum().item() / weights.sum().item() == pytest.approx(0.1, abs=1e-4)
    assert weights[users == 7].tolist() == pytest.approx([1.0] * 10, abs=1e-4)
    assert vote_weights(torch.zeros(3), torch.tensor([0, 0, 1]), 90, 0.1, 0.05).tolist() == [1, 1, 1]


def test_a_fit_is_given_the_answers_that_were_voted_on_and_no_others() -> None:
    votes = VoteTensors(
        a=torch.tensor([7, 2]), b=torch.tensor([4, 7]), outcome=torch.tensor([A, B]),
        temperature_difference=torch.zeros(2), choice_weight=torch.ones(2), choice_group=torch.tensor([0, 1]),
        response=torch.tensor([9]), thumb=torch.tensor([1.0]), user=torch.tensor([0]), thumb_weight=torch.ones(1),
        thumb_group=torch.tensor([0]), users=1,
    )  # fmt: skip
    features, voted = votes.voted(torch.arange(10.0)[:, None])
    assert features.tolist() == [[2.0], [4.0], [7.0], [9.0]]
    assert (voted.a.tolist(), voted.b.tolist(), voted.response.tolist()) == ([2, 0], [1, 2], [3])
    assert (voted.outcome.tolist(), voted.users) == ([A, B], 1)
