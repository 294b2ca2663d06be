"""The signal test: literal cases, what must not count as a signal, and one error for many tests."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.model.features import FeatureSpec
from learner.reward.likelihood import TIE, A, B
from learner.reward.linear_heads import VoteTensors
from learner.reward.sign_flips import Flips, allowance, enough, p_value, signal_test, signs_of, spend
from learner.settings import RewardSettings
from server.store.learning.round_metrics import SignalTest
from tests.learner.reward.test_linear_heads import seeded, taste

MakeVotes = Callable[..., VoteTensors]
SPEC = FeatureSpec(meaning=(1,))


def of_votes(
    features: torch.Tensor, votes: VoteTensors, earlier: SignalTest | None = None, **settings: Any
) -> SignalTest:
    conversations = [f"conv_{number}" for number in range(votes.groups)]
    return signal_test(features, votes, conversations, SPEC, RewardSettings(**settings), 0.02, earlier)


def test_a_signal_is_found_only_if_there_is_one(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    found = of_votes(features, votes)
    assert (found.p_value, found.level, found.passed) == (1e-4, 0.01, True)
    assert (found.votes, found.conversations, found.first_votes, found.spent) == (120, 120, 120, [])
    coin = replace(votes, outcome=torch.randint(2, (120,), generator=seeded(3)))
    refused = of_votes(features, coin)
    assert refused.p_value > 0.05
    # 1 / 10,000 is for the votes themselves.
    assert (refused.passed, len(refused.spent)) == (False, 99)


def test_thumbs_of_people_with_one_each_carry_a_signal(make_votes: MakeVotes) -> None:
    features = torch.randn(120, 20, generator=seeded(1))
    thumbs = [(i, 1 if features[i, 0] > 0 else -1, i) for i in range(120)]
    assert of_votes(features, make_votes(thumbs=thumbs, users=120)).p_value == 1e-4


def test_a_liking_for_the_hotter_answer_is_no_signal(make_votes: MakeVotes) -> None:
    # Answers differ by their temperature and otherwise by chance; nine in ten votes are for the colder one.
    difference = torch.where(torch.rand(100, generator=seeded(1)) < 0.5, 0.3, -0.3)
    features = torch.randn(200, 5, generator=seeded(2))
    features[::2, 0] += 10 * difference
    said = torch.where((torch.rand(100, generator=seeded(3)) < 0.1) == (difference > 0), A, B).tolist()
    votes = make_votes(
        [(2 * i, 2 * i + 1, one) for i, one in enumerate(said)], temperature_difference=difference.tolist()
    )
    assert of_votes(features, votes).p_value > 0.05
    # Without the temperatures it would be one.
    assert of_votes(features, replace(votes, temperature_difference=torch.zeros(100))).passed


def test_always_the_same_slot_is_no_signal(make_votes: MakeVotes) -> None:
    features = (
        torch.randn(200, 5, generator=seeded(2)) + torch.tensor([1.0, 0, 0, 0, 0]) * (torch.arange(200) % 2)[:, None]
    )
    assert of_votes(features, make_votes([(2 * i, 2 * i + 1, A) for i in range(100)])).p_value > 0.05


def test_a_user_who_is_easily_pleased_is_no_signal(make_votes: MakeVotes) -> None:
    # Two users, one of whom asks for longer answers and likes them all.
    features = torch.randn(100, 5, generator=seeded(2))
    features[:50, 0] += 3
    said = torch.rand(100, generator=seeded(4)) < torch.where(torch.arange(100) < 50, 0.9, 0.2)
    thumbs = [(i, 1 if up else -1, i // 50) for i, up in enumerate(said.tolist())]
    assert of_votes(features, make_votes(thumbs=thumbs, users=2)).p_value > 0.05
    assert of_votes(features, make_votes(thumbs=[(i, thumb, 0) for i, thumb, _ in thumbs])).passed


def test_users_with_a_habit_and_a_topic_are_no_signal(make_votes: MakeVotes) -> None:
    # Ten users who are always or never pleased, and who each ask about one thing: whatever they ask about goes with
    # their thumbs, but within a user it does not.
    passed = 0
    for number in range(20):
        chance = seeded(number)
        user = torch.arange(100) // 10
        features = torch.randn(10, 30, generator=chance)[user] + torch.randn(100, 30, generator=chance)
        pleased = torch.randint(2, (10,), generator=chance)[user]
        thumbs = [(i, 1 if up else -1, int(user[i])) for i, up in enumerate(pleased.tolist())]
        passed += of_votes(features, make_votes(thumbs=thumbs, users=10), signal_flips=199).p_value <= 0.05
    assert passed <= 2


def test_the_votes_that_were_not_drawn_count_for_the_allowance(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    coin = replace(votes, outcome=torch.randint(2, (120,), generator=seeded(3)))
    conversations = [f"conv_{number}" for number in range(120)]
    first = signal_test(features, coin, conversations, SPEC, RewardSettings(), 0.02, None, 1_000)
    second = signal_test(features, coin, conversations, SPEC, RewardSettings(), 0.02, first, 2_000)
    assert (first.votes, first.level) == (1_000, 0.01)
    assert (second.votes, second.first_votes, second.level) == (2_000, 1_000, 0.015)


def test_what_one_conversation_says_often_is_said_once(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    together = replace(votes, choice_group=torch.where(torch.arange(120) < 114, 0, torch.arange(120) - 113))
    found = of_votes(features, together)
    # Seven conversations: one flip in 64 leaves everything as it was, up to the sign of all.
    assert (found.conversations, found.passed) == (7, False)
    assert found.p_value > 1 / 64


def test_residuals_get_back_what_their_own_conversation_explained(make_votes: MakeVotes) -> None:
    from learner.reward.sign_flips import _thumbs

    # Two conversations of two thumbs, both up in one and both down in the other. The intercept, prior precision 1/9,
    # and a user's offset, prior precision 1/100, explain c = own (H^-1) own' of every residual of 1/2; sqrt(1 - 2 c) of
    # it is left.
    votes = make_votes(thumbs=[(0, 1, 0), (1, 1, 0), (2, -1, 0), (3, -1, 0)])
    votes = replace(votes, thumb_group=torch.tensor([0, 0, 1, 1]))
    score = _thumbs(torch.zeros(4, 1, dtype=torch.float64), votes)
    assert score.residual.tolist() == [0.5, 0.5, -0.5, -0.5]
    # H = [[1 + 1/9, 1], [1, 1 + 1/100]], c = 1/4 (1, 1) H^-1 (1, 1)' = 1/4 (109/900) / (110/900) = 109/440.
    assert score.full.tolist() == pytest.approx([0.5 / (1 - 2 * 109 / 440) ** 0.5 * sign for sign in (1, 1, -1, -1)])


def test_votes_without_a_winner_carry_no_signal(make_votes: MakeVotes) -> None:
    votes = make_votes([(2 * i, 2 * i + 1, TIE) for i in range(40)])
    found = of_votes(torch.randn(80, 3, generator=seeded()), votes)
    assert (found.p_value, found.enough_votes) == (1.0, None)


@pytest.mark.parametrize("features", [torch.ones(2, 4), torch.tensor([[1.0, 2, 3, 4], [2, 2, 3, 4]])])
def test_one_pair_carries_no_signal_even_if_its_answers_are_identical(
    features: torch.Tensor, make_votes: MakeVotes
) -> None:
    assert of_votes(features, make_votes([(0, 1, A)])).p_value == 1.0


def test_no_votes_and_one_thumb_carry_no_signal(make_votes: MakeVotes) -> None:
    assert of_votes(torch.zeros(0, 4), make_votes()).p_value == 1.0
    assert of_votes(torch.ones(1, 4), make_votes(thumbs=[(0, 1, 0)])).p_value == 1.0


def test_weak_votes_say_how_many_would_suffice() -> None:
    flipped = torch.arange(1000).double() / 100
    # Mean 5, .99 quantile 9.9 and sd 2.89: the statistic must be 7.79 above the mean, and is 2 above it.
    assert enough(Flips(6.995, flipped), 100, 0.01) == 389
    assert enough(Flips(4.9, flipped), 100, 0.01) is None


def test_the_allowance_grows_with_the_votes() -> None:
    assert [allowance(0.02, votes, 40) for votes in (40, 80, 160, 4000)] == pytest.approx([0.01, 0.015, 0.0175, 0.0199])
    # Deleted votes give nothing back.
    assert allowance(0.02, 30, 40) == 0.01


def test_flips_that_passed_before_count_as_passing() -> None:
    flips = Flips(4.0, torch.tensor([5.0, 3.0, 2.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0]))
    assert p_value(flips, []) == pytest.approx(0.3)
    assert p_value(flips, [0]) == pytest.approx(0.3)
    assert p_value(flips, [3]) == pytest.approx(0.4)


def test_the_flips_that_would_have_passed_are_spent() -> None:
    flips = Flips(0.0, torch.tensor([5.0, 3.0, 2.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0]))
    assert spend(flips, [], 0.1) == []
    assert spend(flips, [], 0.3) == [0, 4]
    assert spend(flips, [3], 0.3) == [0, 3]
    # Two that are equal pass together or not at all.
    assert spend(Flips(0.0, torch.tensor([5.0, 4.0, 4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])), [], 0.3) == [0]


def test_a_conversation_has_the_same_signs_in_every_test() -> None:
    assert signs_of(["conv_1", "conv_2"], 6).T.tolist() == [[1, -1, -1, 1, -1, -1], [-1, -1, 1, -1, 1, -1]]
    assert torch.equal(signs_of(["conv_2"], 6)[:, 0], signs_of(["conv_1", "conv_2"], 6)[:, 1])


def test_a_test_repeated_on_the_same_votes_spends_nothing_and_finds_nothing(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    coin = replace(votes, outcome=torch.randint(2, (120,), generator=seeded(3)))
    first = of_votes(features, coin)
    assert of_votes(features, coin, first) == first


def test_tests_on_more_and_more_votes_share_one_error(make_votes: MakeVotes) -> None:
    features, votes = taste(make_votes)
    weak = replace(
        votes, outcome=torch.where(torch.rand(120, generator=seeded(5)) < 0.7, 1 - votes.outcome, votes.outcome)
    )
    test = None
    for count in (40, 80, 120):
        some = replace(
            weak,
            **{name: getattr(weak, name)[:count] for name in ("a", "b", "outcome", "temperature_difference")},
            choice_weight=torch.ones(count),
            choice_group=torch.arange(count),
        )
        test = of_votes(features, some, test)
        assert not test.passed
    assert test is not None
    assert (test.first_votes, test.level) == (40, pytest.approx(0.02 * (1 - 0.5 / 3)))
    # Each spends what the votes' growth allows: 165 flips of 9,999 in all, and one for the votes themselves.
    assert len(test.spent) == 165
