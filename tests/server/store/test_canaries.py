"""Canaries in the store: which choices count, and what ends the wait."""

from dataclasses import replace

import pytest

from server.store.chats.reviews import withdraw_reviews
from server.store.e_value import CanaryResult, chance_of, mean_e_value
from server.store.learning.records import Canary, CanaryTerms
from server.store.store import Store
from tests.server.conftest import register
from tests.server.store.test_lineage import lease
from tests.server.store.test_reviews import PAIR, asked

TERMS = CanaryTerms(evidence=20.0, max_votes=200, days=7.0, unit=1, user_votes=8)


def begin(store: Store, pairs: int = 12, terms: CanaryTerms = TERMS) -> Canary:
    """v0001 waits, with pairs between it and v0000."""
    fence = lease(store)
    round_id = store.rounds.create(0, {}, reference_version="v0000", fence=fence).id
    if not any(policy.version == "v0001" for policy in store.policies.page()):
        register(store, "v0001")
    store.rounds.update(round_id, policy_version="v0001", fence=fence)
    store.rounds.finish(round_id, "rejected", reason="v0001 waits", fence=fence)
    store.reviews.offer(round_id, "canary", [asked(str(number)) for number in range(pairs)], fence=fence)
    store.canaries.begin("v0001", "v0000", round_id, terms, fence=fence)
    canary = store.canaries.waiting()
    assert canary
    return canary


def vote(store: Store, user: str, *, new: bool) -> None:
    """Choose the canary's answer in the user's next review, or the other one."""
    review = store.reviews.next(user)
    assert review
    a_is_new = review.comparison.a.policy_version == "v0001"
    store.feedback.submit_choice(user, review.comparison.id, "A" if a_is_new == new else "B")


@pytest.mark.parametrize(
    ("means", "e"),
    # The mean over the stakes s = .5, 1, 1.5, 1.9 of the product of 1 + s (mean - 1/2): for one win 1 + 1.225 / 2; for
    # two 1 + 1.225 + 1.7775 / 4, the squares' mean; for a win and a loss 1 - 1.7775 / 4.
    [
        ([], 1.0),
        ([0.5], 1.0),
        ([1.0], 1.6125),
        ([0.0], 0.3875),
        ([1.0, 1.0], 2.669375),
        ([1.0, 0.0], 0.555625),
        ([0.75], 1.30625),
    ],
)
def test_the_e_value_of_means_by_hand(means: list[float], e: float) -> None:
    assert mean_e_value(means) == pytest.approx(e)


def test_six_wins_in_a_row_are_evidence_of_twenty() -> None:
    assert mean_e_value([1.0] * 5) < 20 < mean_e_value([1.0] * 6)
    result = CanaryResult((1.0, 0.0, 0.5), 3)
    assert str(result) == "it won 0.50 of 3 choices, evidence that it is better 0.556, worse 0.556"


def test_the_first_choices_of_each_count(store: Store) -> None:
    canary = begin(store, terms=replace(TERMS, user_votes=4))
    for new in (True, True, False):
        vote(store, "ann", new=new)
    review = store.reviews.next("ann")
    assert review
    store.feedback.submit_choice("ann", review.comparison.id, "TIE")
    # The fifth does not count.
    vote(store, "ann", new=True)
    vote(store, "bob", new=True)
    assert store.canaries.result(canary) == CanaryResult((1.0, 1.0, 0.0, 0.5, 1.0), 5)


def test_choices_of_one_person_may_count_together(store: Store) -> None:
    canary = begin(store, terms=replace(TERMS, unit=2, user_votes=2))
    for user, new in (("ann", True), ("bob", True), ("cem", False), ("ann", False), ("cem", False), ("ann", True)):
        vote(store, user, new=new)
    # Of Ann the first two, of Cem both; Bob has cast one of two.
    assert store.canaries.result(canary) == CanaryResult((0.5, 0.0), 4)


def test_taking_back_what_was_lost_does_not_help(store: Store) -> None:
    canary = begin(store)
    vote(store, "ann", new=False)
    [kept] = store.feedback.page("ann", 10)
    store.feedback.retract("ann", kept.id)
    vote(store, "ann", new=True)
    assert store.canaries.result(canary) == CanaryResult((0.0, 1.0), 2)
    # What is deleted is gone.
    for conversation in store.conversations.page("ann", kinds=("review",)):
        store.conversations.delete("ann", conversation.id)
    assert store.canaries.result(canary) == CanaryResult((), 0)


def test_choices_of_users_in_quarantine_and_from_before_do_not_count(store: Store) -> None:
    register(store, "v0001")
    fence = lease(store)
    early = store.rounds.create(0, {}, reference_version="v0000", fence=fence).id
    store.reviews.offer(early, "canary", [PAIR], fence=fence)
    vote(store, "ann", new=True)
    withdraw_reviews(store._db, "canary")
    canary = begin(store)
    vote(store, "mallory", new=False)
    store.quarantine.set("mallory", actor="operator", reason="")
    assert store.canaries.result(canary) == CanaryResult((), 0)


def test_while_it_waits_its_round_and_it_are_a_canary(store: Store) -> None:
    canary = begin(store)
    assert (store.policies.get("v0001").state, store.rounds.get(canary.round_id).state) == ("canary", "canary")
    assert [policy.state for policy in store.policies.page()] == ["canary", "active"]
    # Its weights are needed, and so are those it is compared with.
    assert not store.policies.prune("v0001")
    assert store.canaries.end("v0001", "rejected", "undecided")
    assert not store.canaries.end("v0001", "promoted", "too late")
    round_ = store.rounds.get(canary.round_id)
    assert (round_.state, round_.reason, store.canaries.waiting()) == ("rejected", "undecided", None)
    version = store.policies.get("v0001")
    assert (version.state, version.reason) == ("rejected", "undecided")
    assert store.reviews.next("ann") is None


def test_an_operator_who_promotes_it_has_decided(store: Store) -> None:
    canary = begin(store)
    store.policies.activate("v0001", actor="operator ann", action="promote", reason="looks good")
    round_ = store.rounds.get(canary.round_id)
    assert (round_.state, round_.reason) == ("promoted", "operator ann made v0001 the active version: looks good")
    assert (store.policies.get("v0001").state, store.canaries.waiting()) == ("active", None)


def test_without_its_opponent_there_is_nothing_to_decide(store: Store) -> None:
    canary = begin(store)
    register(store, "v0002")
    store.policies.activate("v0002", actor="operator ann", reason="an older one")
    assert store.rounds.get(canary.round_id).state == "rejected"
    assert (store.policies.get("v0001").state, store.canaries.waiting()) == ("rejected", None)


def test_it_expires_by_its_terms(store: Store) -> None:
    canary = begin(store)
    assert not store.canaries.expired(canary)
    assert canary.expire_time == pytest.approx(canary.create_time + 7 * 86_400)
    store._db.execute("UPDATE canaries SET expire_time = create_time")
    waiting = store.canaries.waiting()
    assert waiting
    assert store.canaries.expired(waiting)


@pytest.mark.parametrize(
    ("means", "chance"),
    [
        ([], 1.0),
        ([0.5, 0.5], 1.0),
        ([1.0] * 6, 1 / 64),
        ([0.0], 1.0),
        ([1.0, 0.0], 0.75),
        # 60 heads of 100 coins; a tie says nothing.
        ([1.0] * 60 + [0.0] * 40, 0.0284440),
        ([1.0] * 60 + [0.0] * 40 + [0.5] * 9, 0.0284440),
        # Of the eight ways to turn these around, only this one and one more sum to 5/6.
        ([1.0, 5 / 6, 0.5], 0.25),
        ([1.0, 5 / 6, 1 / 3], 0.25),
    ],
)
def test_the_chance_of_as_many_votes_for_one_of_two_equals(means: list[float], chance: float) -> None:
    assert chance_of(means) == pytest.approx(chance, abs=1e-6)
