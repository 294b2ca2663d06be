"""What a machine judge said: once a comparison, and what a deletion leaves of it."""

import json

from server.store.chats.machine_choices import Asked
from server.store.store import Store
from tests.server.store.test_deletion import forget, trained
from tests.server.store.test_lineage import lease
from tests.server.store.test_store import CUT, comparison


def asked(store: Store, user: str = "ann") -> Asked:
    conversation = store.conversations.create(user, "which")
    return Asked(comparison(store, conversation, user), user, conversation)


def test_a_comparison_is_judged_once_by_each_judge(store: Store) -> None:
    one = asked(store)
    store.machine_choices.add(one, "m 1", "A", "A")
    store.machine_choices.add(one, "m 1", "B", "B")
    store.machine_choices.add(one, "m 2", "B", "TIE")
    store.machine_choices.add(Asked("comparison_of_nobody", "ann", "c"), "m 1", "A", "A")
    [said] = store.machine_choices.all("m 1")
    assert (said.choice, said.comparison.id, said.feedback_id) == ("A", one.comparison_id, "machine_1")
    [said] = store.machine_choices.all("m 2")
    assert (said.choice, said.feedback_id) == ("TIE", "machine_2")
    assert store.machine_choices.watermark() == 2


def test_the_newest_come_first_and_after_those_that_people_judged(store: Store) -> None:
    chosen, older, newer = asked(store), asked(store), asked(store)
    cut = store.conversations.create("ann", "cut off")
    comparison(store, cut, b=CUT)
    bobs = asked(store, "bob")
    store.feedback.submit_choice("ann", chosen.comparison_id, "A")
    assert store.machine_choices.missing("m", ["bob"]) == [chosen, newer, older]
    store.machine_choices.add(newer, "m", "UNREADABLE", "A")
    assert store.machine_choices.missing("m") == [chosen, bobs, older]


def test_a_snapshot_has_what_was_said_up_to_its_own_watermark(store: Store) -> None:
    first, second, bobs = asked(store), asked(store), asked(store, "bob")
    store.machine_choices.add(first, "m", "A", "A")
    store.machine_choices.add(bobs, "m", "A", "B")
    snapshot = store.snapshots.take(judge="m")
    store.machine_choices.add(second, "m", "B", "B")
    assert [(vote.choice, vote.user) for vote in snapshot.machine] == [("A", "m"), ("TIE", "m")]
    again = store.snapshots.take(judge="m", machine_watermark=snapshot.machine_watermark, without=["bob"])
    assert [vote.comparison_id for vote in again.machine] == [first.comparison_id]
    assert len(store.snapshots.take(judge="m").machine) == 3
    assert store.snapshots.take().machine == []
    # It is no feedback: nobody's vote is counted, and no round becomes due.
    assert (len(snapshot), store.snapshots.count_new_votes()) == (0, 0)


def test_a_deletion_leaves_nothing_that_was_said_and_no_name(store: Store) -> None:
    anns, other, bobs = asked(store), asked(store), asked(store, "bob")
    for one in (anns, other, bobs):
        store.machine_choices.add(one, "m", "A", "A")
    fence = lease(store)
    trained(store, fence, "v0001", {"machine_1": "train", "machine_3": "train"}, "reference", "v0000")
    store.conversations.delete("ann", other.conversation_id)
    assert [said.comparison.id for said in store.machine_choices.all("m")] == [anns.comparison_id, bobs.comparison_id]
    # Nobody voted, but a version was trained on her answers.
    assert forget(store, "ann").policy_versions == ["v0001"]
    rows = [dict(row) for row in store._db.rows("SELECT user, shown, swapped FROM machine_choices ORDER BY seq")]
    gone = {"user": "", "shown": None, "swapped": None}
    assert rows == [gone, gone, {"user": "bob", "shown": "A", "swapped": "A"}]
    assert "ann" not in json.dumps(rows)
