"""Users whose votes are left out, and the history of these decisions."""

from pathlib import Path

import pytest
import sqlite_utils

from server.shared.errors import NotFoundError
from server.store.chats.records import Generation, Span
from server.store.migrations import migrations
from server.store.store import Store
from tests.server.conftest import register
from tests.server.store.conftest import on_sqlite
from tests.server.store.test_store import answer, comparison


def thumbs(store: Store, user: str, count: int, *, up: bool = True) -> None:
    for _ in range(count):
        store.feedback.submit_thumb(user, answer(store, store.conversations.create(user, "hello"), user), up=up)


def test_the_last_decision_holds_and_all_are_stored(store: Store, tmp_path: Path) -> None:
    thumbs(store, "ann", 1)
    assert store.quarantine.set("ann", actor="operator bob", reason="too fast")
    assert not store.quarantine.set("ann", actor="operator eve", reason="again")
    other = Store.open(tmp_path)
    word = other.quarantine.current()["ann"]
    other.close()
    assert (word.actor, word.reason) == ("operator bob", "too fast")
    assert word.create_time == pytest.approx(store._db.now(), abs=60)
    assert store.quarantine.lift("ann", actor="operator bob", reason="a class of pupils")
    assert not store.quarantine.lift("ann", actor="operator bob", reason="")
    assert store.quarantine.current() == {}
    assert store.quarantine.set("ann", actor="operator bob", reason="no class")
    assert [(event.action, event.reason) for event in store.quarantine.events("ann")] == [
        ("set", "too fast"),
        ("lift", "a class of pupils"),
        ("set", "no class"),
    ]
    with pytest.raises(NotFoundError, match="no voter 'anne'"):
        store.quarantine.set("anne", actor="operator bob", reason="")


def test_users_in_quarantine_are_excluded_before_the_limit(store: Store) -> None:
    thumbs(store, "ann", 2)
    conversation = store.conversations.create("eve", "hello")
    response_id = answer(store, conversation, "eve")
    store.feedback.submit_correction("eve", response_id, "mine")
    store.feedback.submit_demonstration(
        "eve", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    store.feedback.submit_choice("eve", comparison(store, conversation, "eve"), "A")
    thumbs(store, "eve", 1)
    assert len(store.snapshots.take()) == 6
    assert store.snapshots.votes_of(["eve"], store.snapshots.watermark()) == 4
    assert store.snapshots.votes_of([], store.snapshots.watermark()) == 0
    left = store.snapshots.take(without=["eve"])
    assert (len(left), {vote.user for vote in left.thumbs}) == (2, {"ann"})
    # Eve's newer votes do not displace ann's.
    assert len(store.snapshots.take(limit=2, without=["eve"]).thumbs) == 2
    assert len(store.snapshots.take(limit=2).thumbs) == 1


def test_a_round_stores_the_users_it_excludes(store: Store) -> None:
    fence = store.leases.acquire("learner", "here", 60)
    assert fence
    begun = store.rounds.create(0, {}, reference_version="v0000", quarantined=["eve", "bob"], fence=fence)
    assert begun.quarantined == ["bob", "eve"]
    assert store.rounds.create(0, {}, reference_version="v0000", fence=fence).quarantined == []


def compared(store: Store, user: str, versions: tuple[str, str], temperatures: tuple[float, float]) -> str:
    comparison_id, *responses = store.responses.begin_comparison(
        user, store.conversations.create(user, "hello"), message="?", replica_id="r", policy_versions=versions,
        prompt_token_ids=[5], temperatures=temperatures, max_tokens=3, seeds=(None, None),
    )  # fmt: skip
    for response, version, chosen_by in zip(responses, versions, (None, "rm0001"), strict=True):
        generation = Generation([7], [-0.5], "hi", "stop", [Span(0, 1, version)])
        store.responses.finish(response, generation, chosen_by if temperatures == (0.7, 1.0) else None)
    return comparison_id


def test_users_in_quarantine_do_not_count_in_an_ab_test(store: Store) -> None:
    register(store, "v0001")
    store.policies.activate("v0001", actor="learner")
    for user, choice in (("ann", "B"), ("eve", "A")):
        store.feedback.submit_choice(user, compared(store, user, ("v0000", "v0001"), (0.85, 0.85)), choice)  # type: ignore[arg-type]
    thumbs(store, "eve", 1, up=False)
    duel = store.lineage.duel(10, 10)
    assert duel
    assert (duel.wins, duel.losses, store.lineage.thumb_rate("v0000")) == (1, 1, (0, 1))
    store.quarantine.set("eve", actor="operator", reason="")
    duel = store.lineage.duel(10, 10)
    assert duel
    assert (duel.wins, duel.losses, store.lineage.thumb_rate("v0000")) == (1, 0, (0, 0))


def test_answers_in_slot_a_are_counted(store: Store) -> None:
    register(store, "v0001")
    for temperatures in ((1.0, 0.7), (0.7, 1.0), (1.0, 0.7)):
        compared(store, "ann", ("v0000", "v0000"), temperatures)
    compared(store, "ann", ("v0001", "v0000"), (0.85, 0.85))
    compared(store, "ann", ("v0000", "v0001"), (0.85, 0.85))
    # Hotter was A in two of three; newer in one of two; of the reward model's choices, in B, none of one.
    assert store.lineage.slot_order() == {"hotter": (2, 3), "newer": (1, 2), "chosen": (0, 1)}
    # The newest three: one on temperatures and two on versions.
    assert store.lineage.slot_order(3) == {"hotter": (1, 1), "newer": (1, 2), "chosen": (0, 0)}


@on_sqlite
def test_an_older_round_excluded_nobody(tmp_path: Path) -> None:
    old = sqlite_utils.Database(tmp_path / "prefloop.db")
    migrations.apply(old, stop_before="m007_quarantine")
    old.execute(
        "INSERT INTO rounds (id, state, stage, watermark, incumbent_version, reference_version, settings, create_time) "
        "VALUES ('round_1', 'rejected', 'snapshot', 3, 'v0000', 'v0000', '{}', 1.0)"
    )
    old.conn.commit()
    old.close()
    store = Store.open(tmp_path)
    assert store.rounds.get("round_1").quarantined == []
    assert store.quarantine.current() == {}
    store.close()


def test_a_deleted_user_is_removed_from_quarantine(store: Store) -> None:
    thumbs(store, "ann", 1)
    thumbs(store, "eve", 1)
    for user in ("ann", "eve"):
        store.quarantine.set(user, actor="operator bob", reason="too fast")
    lease = store.leases.acquire("learner", "me", 60.0)
    assert lease
    round_ = store.rounds.create(2, {}, reference_version="v0000", quarantined=["ann", "eve"], fence=lease)
    while store.deletion.step("ann"):
        pass
    assert store.quarantine.events("ann") == []
    assert list(store.quarantine.current()) == ["eve"]
    assert store.rounds.get(round_.id).quarantined == ["eve"]
