"""Lineage: a round's votes, the pointer's moves, and which versions may be pruned."""

from pathlib import Path

import pytest

from server.shared.errors import ConflictError, FailedPreconditionError
from server.store.learning.records import Lease
from server.store.store import Store
from tests.server.conftest import register
from tests.server.store.test_store import answer


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path)
    store.policies.register_reference()
    return store


def lease(store: Store) -> Lease:
    held = store.leases.acquire("learner", "here", 60)
    assert held
    return held


def test_a_rounds_votes_are_stored_once_and_outlive_their_conversation(store: Store) -> None:
    conversation = store.conversations.create("ann", "hello")
    thumbs = [store.feedback.submit_thumb("ann", answer(store, conversation), up=True).id for _ in range(3)]
    fence = lease(store)
    round_ = store.rounds.create(store.snapshots.watermark(), {}, reference_version="v0000", fence=fence)
    store.lineage.set_round_votes(round_.id, [(thumbs[0], "judge")], fence=fence)
    store.lineage.set_round_votes(round_.id, [(thumbs[0], "train"), (thumbs[1], "judge")], fence=fence)
    with pytest.raises(Exception, match=r"(?i)unique constraint"):
        store.lineage.set_round_votes(round_.id, [(thumbs[2], "train"), (thumbs[2], "judge")], fence=fence)
    assert store.lineage.round_votes(round_.id) == {thumbs[0]: "train", thumbs[1]: "judge"}
    assert store.lineage.rounds_of(thumbs[1]) == {round_.id: "judge"}
    assert store.lineage.fate(round_.id, round_.watermark) == {"changed": 0, "retracted": 0, "deleted": 0}
    store.feedback.retract("ann", thumbs[1])
    assert store.lineage.fate(round_.id, round_.watermark) == {"changed": 0, "retracted": 1, "deleted": 0}
    store.conversations.delete("ann", conversation)
    assert store.lineage.fate(round_.id, round_.watermark) == {"changed": 0, "retracted": 1, "deleted": 1}
    assert store.lineage.rounds_of(thumbs[0]) == {round_.id: "train"}
    assert [(event.action, event.value) for event in store.lineage.events(thumbs[0])] == [
        ("submit", None),
        ("delete", None),
    ]


def test_a_learner_without_the_lease_writes_no_votes(store: Store) -> None:
    fence = lease(store)
    round_ = store.rounds.create(0, {}, reference_version="v0000", fence=fence)
    store.leases.release(fence)
    assert store.leases.acquire("learner", "another", 60)
    with pytest.raises(ConflictError):
        store.lineage.set_round_votes(round_.id, [("fb", "train")], fence=fence)
    with pytest.raises(ConflictError):
        store.policies.prune("v0000", fence=fence)


def test_every_move_of_the_pointer_records_action_and_actor(store: Store) -> None:
    for version in ("v0001", "v0002"):
        register(store, version)
    store.policies.activate("v0001", actor="learner", reason="a round")
    store.policies.activate("v0002", actor="operator ann", action="promote")
    store.policies.fail("v0002", "a tensor is missing", "v0001")
    store.policies.activate("v0000", actor="operator bob", action="rollback")
    assert [(move.version, move.previous_version, move.action, move.actor) for move in store.lineage.moves()] == [
        ("v0000", "v0001", "rollback", "operator bob"),
        ("v0001", "v0002", "fail", "server"),
        ("v0002", "v0001", "promote", "operator ann"),
        ("v0001", "v0000", "activate", "learner"),
        ("v0000", None, "activate", "server"),
    ]


def test_a_version_counts_as_rolled_back_until_it_is_active_again(store: Store) -> None:
    register(store, "v0001")
    store.policies.activate("v0001", actor="learner")
    before = store._db.now()
    store.policies.activate("v0000", actor="ann", action="rollback")
    assert store.lineage.rolled_back(before) == set()
    assert store.lineage.rolled_back(float("inf")) == {"v0001"}
    rolled = store._db.now()
    store.policies.activate("v0001", actor="ann", action="promote")
    assert store.lineage.rolled_back(float("inf")) == set()
    assert store.lineage.rolled_back(rolled) <= {"v0001"}


def test_going_back_to_another_model_says_nothing_against_a_version(store: Store) -> None:
    store.policies.register(
        "v0001", kind="full", state="candidate", parent_version=None, reference_version="v0001", round_id=None,
        reward_model_version=None, metrics={},
    )  # fmt: skip
    store.policies.activate("v0001", actor="ann", action="promote")
    store.policies.activate("v0000", actor="ann", action="rollback")
    assert store.lineage.rolled_back(float("inf")) == set()


def test_a_rollback_only_goes_to_an_earlier_active_version(store: Store) -> None:
    register(store, "v0001", "rejected")
    with pytest.raises(FailedPreconditionError, match="v0001 is rejected and was never active; promote it"):
        store.policies.activate("v0001", actor="ann", action="rollback")
    store.policies.activate("v0001", actor="ann", action="promote")
    assert store.policies.active().version == "v0001"


def test_versions_in_use_are_not_pruned_and_pruned_ones_not_activated(store: Store) -> None:
    for version in ("v0001", "v0002", "v0003"):
        register(store, version)
    store.policies.activate("v0001", actor="ann")
    store.replicas.report("r1", "v0002")
    assert not store.policies.prune("v0000")  # The reference of all.
    assert not store.policies.prune("v0001")  # Active.
    assert not store.policies.prune("v0002")  # A server has it loaded.
    store._db.execute("UPDATE replicas SET uptime = uptime - 31")
    assert store.policies.prune("v0002")  # The server is gone.
    assert store.policies.prune("v0003")
    assert not store.policies.prune("v0003")  # Once.
    with pytest.raises(FailedPreconditionError, match="v0003 was pruned"):
        store.policies.activate("v0003", actor="ann")
    # The incumbent of a running round, though no longer active.
    store.rounds.create(0, {}, reference_version="v0000", fence=lease(store))
    store.policies.activate("v0000", actor="ann", action="rollback")
    assert not store.policies.prune("v0001")


def test_votes_on_some_versions_are_left_out(store: Store) -> None:
    conversation = store.conversations.create("ann", "hello")
    store.feedback.submit_thumb("ann", answer(store, conversation), up=True)  # Tokens of v0000 and of v0001.
    snapshot = store.snapshots.take()
    assert len(snapshot.without(set())) == 1
    assert len(snapshot.without({"v0002"})) == 1
    assert len(snapshot.without({"v0001"})) == 0
