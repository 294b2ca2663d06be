"""How much a machine judge's choices count, and that they only train."""

from dataclasses import replace
from typing import Any

import pytest

from learner.reward.dataset import is_judge, to_dataset
from learner.reward.machine_votes import Agreement, agreement, machine_weight
from learner.settings import RewardSettings
from server.store.chats.records import Snapshot
from tests.learner.reward.test_dataset import NOW, choice, encode

TRAIN = [name for name in (f"c{number}" for number in range(200)) if not is_judge(name, 0.4)]
JUDGE = [name for name in (f"c{number}" for number in range(200)) if is_judge(name, 0.4)]


def said(name: str, value: Any) -> Any:
    return replace(choice(name, value, user="m 1"), feedback_id=f"machine_{name}")


def test_agreement_is_on_pairs_that_both_decided() -> None:
    machine = [said("c1", "A"), said("c2", "B"), said("c3", "TIE"), said("c4", "A"), said("c5", "A")]
    people = [choice("c1", "A"), choice("c2", "A"), choice("c3", "A"), choice("c4", "TIE"), choice("c6", "B")]
    assert agreement(machine, people) == Agreement(2, 1)


@pytest.mark.parametrize(
    ("pairs", "agreed", "weight"),
    [
        (19, 19, 0.0),  # too few to know
        (20, 20, (2 * 21 / 22 - 1) ** 2),
        (30, 27, 0.5625),
        (100, 50, 0.0),  # a coin
        (100, 10, 0.0),  # against people: nothing is turned round
    ],
)
def test_a_choice_counts_as_much_as_it_says(pairs: int, agreed: int, weight: float) -> None:
    assert Agreement(pairs, agreed).weight == pytest.approx(weight, abs=1e-12)


def test_the_interval_of_the_agreement() -> None:
    assert Agreement(30, 27).interval == pytest.approx((0.743789, 0.965401), abs=1e-6)


@pytest.mark.parametrize(
    ("trust", "votes", "people", "share", "weight"),
    [
        (0.5, 10, 40.0, 0.5, 0.5),  # 5 of 45
        (0.5, 100, 40.0, 0.5, 0.4),  # 40 of 80
        (0.5, 100, 30.0, 0.25, 0.1),  # 10 of 40
        (0.5, 100, 0.0, 0.5, 0.0),
        (0.5, 100, 1.0, 1.0, 0.5),
        (0.5, 0, 1.0, 0.5, 0.5),
    ],
)
def test_together_they_have_a_share(trust: float, votes: int, people: float, share: float, weight: float) -> None:
    assert machine_weight(trust, votes, people, share) == pytest.approx(weight)


def test_they_train_and_neither_judge_nor_are_tested() -> None:
    people = [choice(name, "A") for name in TRAIN[:30]] + [choice(name, "A") for name in JUDGE[:10]]
    machine = [said(name, "A") for name in [*TRAIN[:30], *JUDGE[:10]]]
    alone = to_dataset(Snapshot(1, people, [], [], []), NOW, 0.4, RewardSettings(), encode)
    both = to_dataset(Snapshot(1, people, [], [], [], machine=machine), NOW, 0.4, RewardSettings(), encode)
    # It agreed with people on all 30 pairs: 31 / 32.
    weight = both.votes.choice_weight[both.by_machine]
    assert len(weight) == 30
    assert weight.unique().tolist() == pytest.approx([0.878906], abs=1e-6)
    # What people said counts as it did, and nothing else is tested or judges.
    assert both.votes.choice_weight[~both.by_machine].tolist() == alone.votes.choice_weight.tolist()
    assert len(both.shown[0]) == len(alone.shown[0]) == 40
    assert len(both.judge) == len(alone.judge) == 10
    assert len(both.train) - len(alone.train) == 30
    assert [side for name, side in both.sides if name.startswith("machine_")] == ["train"] * 30
    assert both.left_out == 0


def test_the_share_is_of_the_votes_that_train() -> None:
    people = [choice(name, "A") for name in TRAIN[:25]] + [choice(name, "A") for name in JUDGE[:50]]
    machine = [said(name, "A") for name in TRAIN[:100]]
    settings = RewardSettings(machine_share=0.5)
    found = to_dataset(Snapshot(1, people, [], [], [], machine=machine), NOW, 0.4, settings, encode)
    trains = ~found.judging
    assert found.votes.choice_weight[found.by_machine].sum().item() == pytest.approx(25.0, abs=1e-4)
    assert found.votes.choice_weight[trains & ~found.by_machine].sum().item() == pytest.approx(25.0, abs=1e-4)


def test_a_judge_that_nobody_can_vouch_for_counts_nothing() -> None:
    people, machine = [choice(name, "A") for name in TRAIN[:10]], [said(name, "A") for name in TRAIN[:40]]
    found = to_dataset(Snapshot(1, people, [], [], [], machine=machine), NOW, 0.4, RewardSettings(), encode)
    assert found.votes.choice_weight[found.by_machine].sum() == 0
