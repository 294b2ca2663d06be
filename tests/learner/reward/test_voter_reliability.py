"""Voters who vote against the others count less; those whose taste merely differs do not."""

from dataclasses import replace

import pytest
import torch

from learner.model.features import FeatureSpec
from learner.reward.dataset import Dataset
from learner.reward.likelihood import A, B
from learner.reward.linear_heads import VoteTensors
from learner.reward.voter_reliability import Verdicts, kinds, one_sided, thumb_pairs, trust, verdicts, weigh_voters
from learner.settings import RewardSettings

SPEC = FeatureSpec(meaning=(1,))
NONE = torch.zeros(0, dtype=torch.long)


def voters(*groups: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`groups` of (voters, right, heard) as two columns."""
    rows = [(right, heard) for count, right, heard in groups for _ in range(count)]
    right, heard = torch.tensor(rows).unbind(dim=1)
    return right, heard


def test_voters_against_the_others_are_found() -> None:
    found = kinds(*voters((30, 8, 10), (5, 2, 10)))
    assert found.shares.tolist() == pytest.approx([6 / 7, 0, 1 / 7], abs=0.02)
    assert found.rate == pytest.approx(0.8, abs=0.01)
    assert found.against[30:].min() > 0.95
    assert found.against[:30].max() < 0.001


def test_a_voter_between_the_kinds_counts_by_what_is_known() -> None:
    # Four of ten: with a rate of 0.8 and a share of 1/7, about as likely against (1/7 * .8^6 * .2^4) as with the others
    # (6/7 * .8^4 * .2^6 = 3/8 of it), and aside hardly anybody is.
    doubt = kinds(*voters((30, 8, 10), (5, 2, 10), (1, 4, 10))).against[-1].item()
    assert 0.4 < doubt < 0.8


@pytest.mark.parametrize(
    "groups",
    [
        [(40, 7, 10)],  # Honest.
        [(20, 6, 10), (20, 8, 10)],  # Some slip more.
        [(32, 8, 10), (8, 5, 10)],  # A fifth with another taste.
        [(40, 2, 3), (4, 1, 3)],  # Few votes each.
        [(7, 10, 10), (2, 0, 10)],  # Few voters.
        [(10, 8, 10), (30, 2, 10)],  # More against than with: nobody can tell who is right.
    ],
)
def test_otherwise_everybody_counts_in_full(groups: list[tuple[int, int, int]]) -> None:
    assert kinds(*voters(*groups)).against.tolist() == [0.0] * sum(count for count, _, _ in groups)


def test_a_voter_who_always_names_one_slot_among_many_does_not_count() -> None:
    nothing = torch.zeros(12)
    found = Verdicts(nothing, nothing, torch.tensor([12] * 12), torch.tensor([6] * 11 + [12]))
    # Twelve voters, two sides, 2^12 ways.
    assert one_sided(found)[-1] == pytest.approx(12 * 2 / 4096)
    assert trust(found).tolist() == [1.0] * 11 + [0.0]
    assert trust(replace(found, named_a=torch.tensor([6] * 11 + [10]))).tolist() == [1.0] * 12
    alone = Verdicts(nothing[:1], nothing[:1], torch.tensor([40]), torch.tensor([40]))
    assert trust(alone).tolist() == [1.0]


def test_thumbs_are_paired_per_voter_each_once() -> None:
    up, down = thumb_pairs(torch.tensor([1.0, 1, -1, -1, 1, -1, 1]), torch.tensor([0, 1, 0, 0, 1, 2, 2]))
    # Voter 0: the first up with the first down, the second down alone. Voter 1 has no down. Voter 2: down, then up.
    assert (up.tolist(), down.tolist()) == ([0, 6], [2, 5])


def crowd(users: int = 12, each: int = 20, hostile: int = 1) -> tuple[Dataset, torch.Tensor]:
    """Choices by the first feature; the first `hostile` users say the opposite. A third of the votes judges."""
    generator = torch.Generator().manual_seed(0)
    n = users * each
    features = torch.randn(2 * n, 8, generator=generator)
    user = torch.arange(n) % users
    better = features[::2, 0] > features[1::2, 0]
    votes = VoteTensors(
        a=torch.arange(0, 2 * n, 2), b=torch.arange(1, 2 * n, 2), outcome=torch.where(better ^ (user < hostile), A, B),
        temperature_difference=torch.zeros(n), choice_weight=torch.ones(n), choice_group=torch.arange(n),
        response=NONE, thumb=torch.zeros(0), user=NONE, thumb_weight=torch.zeros(0), thumb_group=NONE, users=users,
    )  # fmt: skip
    judges = torch.arange(n) // users % 3 == 0
    names = [f"user{number}" for number in range(users)]
    ones = torch.ones(n)
    return Dataset([], votes, [], judges, [], names, user, ones.bool(), torch.ones(len(names)), ~ones.bool()), features


def weigh(dataset: Dataset, features: torch.Tensor) -> tuple[Dataset, list[float]]:
    weighed, factors = weigh_voters(dataset, features, SPEC, RewardSettings(), torch.Generator().manual_seed(0))
    return weighed, factors.tolist()


def test_votes_have_their_voters_weight_on_both_sides() -> None:
    dataset, features = crowd()
    weighed, factors = weigh(dataset, features)
    assert factors[0] < 0.01
    assert min(factors[1:]) > 0.99
    assert weighed.train.choice_weight.tolist() == pytest.approx([factors[u] for u in dataset.voters[~dataset.judging]])
    assert weighed.judge.choice_weight[dataset.voters[dataset.judging] == 0].max() < 0.01
    assert weigh(*crowd(hostile=0))[1] == [1.0] * 12


def test_judge_votes_do_not_affect_voters_weights() -> None:
    dataset, features = crowd()
    turned = torch.where(dataset.judging, 1 - dataset.votes.outcome, dataset.votes.outcome)
    other = replace(dataset, votes=replace(dataset.votes, outcome=turned))
    assert weigh(other, features)[1] == weigh(dataset, features)[1]


def test_verdicts_are_on_comparisons_by_a_model_without_the_voter() -> None:
    dataset, features = crowd(each=20)
    compared = torch.arange(240) >= 12  # Everybody's first choice is a correction.
    found = verdicts(
        features, dataset.votes, dataset.voters, compared, 12, SPEC, RewardSettings(), torch.Generator().manual_seed(0)
    )
    assert found.heard.tolist() == found.sided.tolist() == [19] * 12
    assert found.right[0] <= 3
    assert found.right[1:].min() >= 14
    # Twenty votes of one voter alone: without them nothing predicts them.
    alone = replace(dataset.votes, choice_weight=(dataset.voters == 0).float())
    found = verdicts(
        features, alone, dataset.voters, compared, 12, SPEC, RewardSettings(), torch.Generator().manual_seed(0)
    )
    assert found.heard[0] == 0
    assert found.right[1:].max() <= 5


def test_a_harsh_voter_contradicts_nobody_and_a_liar_does() -> None:
    dataset, features = crowd(hostile=0)
    # Two more users with thumbs alone, on the same answers: one likes the best tenth only, one likes the worse half.
    some = torch.arange(60)
    first = features[some, 0]
    thumb = torch.cat([torch.where(first > first.quantile(0.9), 1.0, -1.0), torch.where(first < 0, 1.0, -1.0)])
    user = torch.tensor([12] * 60 + [13] * 60)
    votes = replace(
        dataset.votes, response=some.repeat(2), thumb=thumb, user=user, thumb_weight=torch.ones(120),
        thumb_group=torch.arange(120) + 240, users=14,
    )  # fmt: skip
    found = verdicts(
        features, votes, torch.cat([dataset.voters, user]), dataset.compared, 14, SPEC, RewardSettings(),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found.heard[12] == 6
    assert found.right[12] == 6
    assert found.right[13] <= 2
    assert found.heard[13] >= 20
