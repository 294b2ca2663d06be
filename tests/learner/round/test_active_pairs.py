"""Pairs of one version's answers to learn from: which two of many, to which prompts, and whom they are for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import learner.round.alignment.stages as alignment
import learner.round.gate.gate_stage as judging
import learner.round.review.active_pairs as active_pairs
import learner.round.workspace as workspace
from learner.reward.dataset import is_judge, to_dataset
from learner.round.prompts import Prompts
from learner.round.review.active_pairs import most_disputed
from learner.round.review.prompts import training_prompts
from server.store.chats.records import Prompt
from server.store.chats.reviews import review_key
from server.store.store import Store
from tests.learner.rounds import passing, run, settings

pytestmark = pytest.mark.usefixtures("engine")
PAIRS = {"pairs": 8, "own_pairs": 2, "active_pairs": 6, "active_answers": 4}


def test_the_pair_on_which_the_members_disagree_most() -> None:
    # Three answers to each of two prompts, two members. On the first prompt both say that the second answer is far
    # better than the first, and they disagree about the first and the third by 2; on the second prompt about the last
    # two by 3.
    scores = torch.tensor([[0.0, 9.0, 1.0, 0.0, 0.0, 1.5], [0.0, 9.0, -1.0, 0.0, 0.0, -1.5]])
    assert [sorted(pair) for pair in most_disputed(scores, 3)] == [[0, 2], [3, 5]]


def test_a_certain_difference_teaches_nothing_however_large() -> None:
    # The members differ by 4 about how much better the second answer is, but not about which of the two is.
    scores = torch.tensor([[0.0, 12.0, 0.5], [0.0, 8.0, -0.5]])
    assert [sorted(pair) for pair in most_disputed(scores, 3)] == [[0, 2]]


def test_a_round_offers_pairs_of_the_version_that_serves(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    report = run(data_dir, review=PAIRS)
    assert report.state == "promoted"
    store = Store.open(data_dir)
    rows = store._db.rows("SELECT * FROM reviews")
    assert {row["purpose"] for row in rows} == {"learn"}
    # Ann asked all questions; the pool's are for everybody. An answer is left out if both are the same.
    assert 6 <= len(rows) <= 8
    assert sum(row["user"] == "ann" for row in rows) == 2
    review = store.reviews.next("bob")
    assert review
    assert [answer.policy_version for answer in (review.comparison.a, review.comparison.b)] == ["v0001", "v0001"]
    assert review.comparison.a.token_ids != review.comparison.b.token_ids


def test_choices_on_them_train_and_never_judge(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "decide", passing)
    run(data_dir, review={**PAIRS, "active_pairs": 16})
    store = Store.open(data_dir)
    keys = [
        row["conversation_id"] or review_key(json.loads(row["messages"]))
        for row in store._db.rows("SELECT * FROM reviews")
    ]
    assert [is_judge(key, 0.4) for key in keys] == [False] * len(keys)
    watermark = store.snapshots.watermark()
    while review := store.reviews.next("bob"):
        store.feedback.submit_choice("bob", review.comparison.id, "A")
    reward = settings(data_dir).reward
    before, after = (
        len(to_dataset(store.snapshots.take(at), 0.0, 0.4, reward, lambda *_: [3]).judge) for at in (watermark, None)
    )
    assert store.snapshots.count_votes(after=watermark) > 8
    assert after == before


def test_a_rejected_round_offers_pairs_of_the_incumbent(data_dir: Path) -> None:
    report = run(data_dir, review=PAIRS, policy={"lora_rank": 4, "kl_budget": 1e-9})
    assert report.state == "rejected"
    store = Store.open(data_dir)
    review = store.reviews.next("bob")
    assert review
    assert [answer.policy_version for answer in (review.comparison.a, review.comparison.b)] == ["v0000", "v0000"]


def test_what_goes_wrong_after_the_round_does_not_change_its_outcome(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the engine has died")

    monkeypatch.setattr(judging, "decide", passing)
    monkeypatch.setattr(active_pairs, "sample_answers", broken)
    assert run(data_dir, review=PAIRS).state == "promoted"
    [round_] = Store.open(data_dir).rounds.page()
    assert (round_.state, round_.stage) == ("promoted", "activate")


def test_an_own_prompt_is_on_the_side_of_its_own_conversation(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a template writes the date, the same words are two prompts, on the side of the first conversation."""
    monkeypatch.setattr(judging, "decide", passing)
    split = workspace.split_prompts

    def all_train(prompts: list[Prompt], *rest: Any) -> Prompts:
        sides = split(prompts, *rest)
        return Prompts(sides.train + sides.held_out, sides.held_out)

    monkeypatch.setattr(workspace, "split_prompts", all_train)
    run(data_dir, review={**PAIRS, "own_pairs": 64, "active_pairs": 64, "active_answers": 2})
    rows = Store.open(data_dir)._db.rows("SELECT conversation_id FROM reviews WHERE conversation_id IS NOT NULL")
    assert len(rows) > 16
    assert not any(is_judge(row["conversation_id"], 0.4) for row in rows)


def test_each_round_asks_something_else(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def noted(work: Any) -> Any:
        for more_votes in (0, 0, 1):
            work.round = replace(work.round, watermark=work.round.watermark + more_votes)
            asked.append([prompt.messages[0]["content"] for prompt in training_prompts(work)])
        return []

    monkeypatch.setattr(judging, "decide", passing)
    monkeypatch.setattr(active_pairs, "training_prompts", noted)
    run(data_dir, review={**PAIRS, "own_pairs": 0})
    assert [len(prompts) for prompts in asked] == [6, 6, 6]
    assert asked[0] == asked[1] != asked[2]


def test_a_version_of_another_model_answers_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator may go back to one while a round runs."""

    def moved(work: Any, *_: Any) -> Any:
        """As `activate` ends once the pointer was moved."""
        policies = work.store.policies
        policies.register(
            "v0009", kind="full", state="candidate", parent_version=None, reference_version="v0009", round_id=None,
            reward_model_version=None, metrics={},
        )  # fmt: skip
        policies.activate("v0009", actor="operator")
        return "rejected", "The active version was changed in the meantime."

    monkeypatch.setattr(alignment, "improve_and_judge", moved)
    assert run(data_dir, review=PAIRS).state == "rejected"
    assert Store.open(data_dir).reviews.waiting("ann") == 0


@pytest.mark.parametrize("changes", [{"review": {**PAIRS, "active_pairs": 0}}, {"gate": {"canary_recent_votes": 81}}])
def test_where_nobody_would_compare_them_none_are_sampled(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("nobody would compare these answers")

    monkeypatch.setattr(judging, "decide", passing)
    monkeypatch.setattr(active_pairs, "sample_answers", never)
    gate = settings(data_dir).gate.model_copy(update=changes.get("gate", {}))
    assert run(data_dir, gate=gate, review=changes.get("review", PAIRS)).state == "promoted"
