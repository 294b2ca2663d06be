"""What is deleted permanently, and the numbers that stay."""

from pathlib import Path

import pytest

from server.shared.errors import FailedPreconditionError, NotFoundError
from server.store.deletion import STEP, Kept
from server.store.keys import Credentials
from server.store.learning.records import Lease
from server.store.store import Store
from tests.server.store.conftest import on_sqlite
from tests.server.store.test_lineage import lease
from tests.server.store.test_store import answer, comparison

DAY = 86_400.0


def trained(store: Store, fence: Lease, version: str, votes: dict[str, str], start_from: str, parent: str) -> str:
    """A finished round that published `version`, as the learner records one."""
    settings = {"policy": {"start_from": start_from}}
    round_ = store.rounds.create(store.snapshots.watermark(), settings, reference_version="v0000", fence=fence)
    store.lineage.set_round_votes(round_.id, list(votes.items()), fence=fence)  # type: ignore[arg-type]
    store.reward_models.register(
        version.replace("v", "rm"), reference_version="v0000", round_id=round_.id, metrics={}, fence=fence
    )
    store.policies.register(
        version, kind="full", state="candidate", parent_version=parent, reference_version="v0000", round_id=round_.id,
        reward_model_version=None, metrics={}, fence=fence,
    )  # fmt: skip
    store.rounds.finish(round_.id, "rejected", reason="", fence=fence)
    return round_.id


def forget(store: Store, user: str) -> Kept:
    kept = store.deletion.look(user)
    while store.deletion.step(user):
        pass
    return kept


def thumb(store: Store, user: str) -> tuple[str, str]:
    """A new conversation and the id of a thumb in it."""
    conversation_id = store.conversations.create(user, "hello")
    return conversation_id, store.feedback.submit_thumb(user, answer(store, conversation_id, user), up=True).id


def test_a_deletion_removes_all_of_a_user_and_nothing_of_others(store: Store) -> None:
    for user in ("ann", "bob"):
        conversation_id = store.conversations.create(user, "hello")
        response_id = answer(store, conversation_id, user)
        store.feedback.submit_thumb(user, response_id, up=True, comment="so")
        store.feedback.submit_correction(user, response_id, "thus")
        store.feedback.submit_choice(user, comparison(store, conversation_id, user), "A")
        store.feedback.submit_demonstration(
            user, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        store.requests.remember(user, "SubmitDemonstration", "r1", b"body", b"answer")
        retracted = store.feedback.submit_demonstration(user, [{"role": "user", "content": "x"}])
        store.feedback.retract(user, retracted.id)
    watermark = store.snapshots.watermark()
    kept = forget(store, "ann")
    assert (kept.conversations, kept.votes, kept.policy_versions) == (1, 4, [])
    for table in ("conversations", "responses", "comparisons", "feedback", "requests", "feedback_events"):
        users = {row["user"] for row in store._db.rows(f"SELECT DISTINCT user FROM {table}")}
        assert users == ({"bob", ""} if table == "feedback_events" else {"bob"}), table
    # Event numbers stay, with four more for the deletions, and none of them has content.
    assert store.snapshots.watermark() == watermark + 4
    assert store._db.rows("SELECT count(*) AS n FROM feedback_events WHERE user = ''") == [{"n": 10}]
    content = "SELECT 1 FROM feedback_events WHERE user = '' AND (value IS NOT NULL OR comment IS NOT NULL)"
    assert store._db.rows(content) == []
    snapshot = store.snapshots.take()
    assert {vote.user for vote in (*snapshot.choices, *snapshot.thumbs, *snapshot.demonstrations)} == {"bob"}
    assert len(snapshot) == 4
    assert forget(store, "ann") == Kept(0, 0, [], [], [])


def test_versions_trained_on_a_user_are_named_even_after_an_interrupted_deletion(store: Store) -> None:
    ours = [thumb(store, "ann")[1] for _ in range(STEP + 1)]
    _, theirs = thumb(store, "bob")
    fence = lease(store)
    trained(store, fence, "v0001", {ours[0]: "train", theirs: "judge"}, "reference", "v0000")
    trained(store, fence, "v0002", {theirs: "train"}, "active", "v0001")  # Inherits ann's votes.
    trained(
        store, fence, "v0003", {ours[0]: "judge", theirs: "train"}, "reference", "v0002"
    )  # Only judged by ann's votes.
    running = store.rounds.create(store.snapshots.watermark(), {}, reference_version="v0000", fence=fence)
    store.lineage.set_round_votes(running.id, [(ours[1], "train")], fence=fence)
    expected = Kept(STEP + 1, STEP + 1, ["v0001", "v0002"], ["rm0001"], [running.id])
    assert store.deletion.look("ann") == expected
    assert store.deletion.step("ann")
    # Killed here, and then repeated.
    assert forget(store, "ann") == Kept(1, 1, ["v0001", "v0002"], ["rm0001"], [running.id])
    # The lineage of the running round keeps the vote's id.
    assert store.lineage.round_votes(running.id) == {ours[1]: "train"}
    assert store.lineage.fate(running.id, running.watermark) == {"changed": 0, "retracted": 0, "deleted": 1}
    assert [event.user for event in store.lineage.events(ours[1])] == ["", ""]


def test_a_deleted_conversation_leaves_no_content_of_votes_that_were_replaced_or_retracted(
    store: Store,
) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    response_id = answer(store, conversation_id)
    store.feedback.submit_thumb("ann", response_id, up=True, comment="first")
    store.feedback.submit_thumb("ann", response_id, up=False, comment="second")
    retracted = store.feedback.submit_correction("ann", response_id, "third")
    store.feedback.retract("ann", retracted.id)
    store.conversations.delete("ann", conversation_id)
    assert [(event["value"], event["comment"]) for event in store._db.rows("SELECT * FROM feedback_events")] == [
        (None, None)
    ] * 5


def test_a_repeated_message_does_not_restart_a_deleted_conversation(store: Store) -> None:
    conversation_id, _ = thumb(store, "ann")
    [response] = store._db.rows("SELECT id FROM responses")
    store.requests.remember("ann", "Chat", "r1", b"body", b"what was said", response["id"])
    store.requests.remember("ann", "Chat", "r2", b"body", b"another", "resp_another")
    store.conversations.delete("ann", conversation_id)
    with pytest.raises(FailedPreconditionError, match="The result of this request was deleted"):
        store.requests.find("ann", "Chat", "r1", b"body")
    assert store._db.row("SELECT body_sha256, result FROM requests WHERE request_id = 'r1'") == {
        "body_sha256": b"",
        "result": b"",
    }
    assert store.requests.find("ann", "Chat", "r2", b"body") == b"another"


@on_sqlite
def test_the_target_of_old_stored_requests_is_found(tmp_path: Path) -> None:
    from server.store.migrations import m008_deletions

    store = Store.open(tmp_path)
    target = "resp_" + "0a" * 12
    store.requests.remember("ann", "SubmitThumb", "r1", b"body", b"\n\x07fb_1\x1a" + target.encode() + b"J\x02so")
    store.requests.remember("ann", "SubmitDemonstration", "r2", b"body", b"\n\x07fb_2")
    names = ("by_target", "by_time", "by_response_a", "by_response_b", "by_response", "by_comparison")
    tables = ("requests", "conversations", "comparisons", "comparisons", "feedback_events", "feedback_events")
    for table, name in zip(tables, names, strict=True):
        store._db.execute(f"DROP INDEX {table}_{name}")
    store._db.execute("DROP TABLE deletions")
    store._db.execute("ALTER TABLE requests DROP COLUMN target")
    m008_deletions(store._db._db)
    assert [row["target"] for row in store._db.rows("SELECT target FROM requests ORDER BY request_id")] == [
        target,
        None,
    ]
    store.close()


def test_a_deleted_users_keys_are_revoked_and_anonymous(store: Store) -> None:
    key, other = store.keys.create("ann", "user"), store.keys.create("bob", "user")
    store.keys.forget("ann")
    credentials = store.keys.credentials()
    assert credentials.caller(key) is None
    assert credentials.caller(other) is not None
    assert {(kept.user, kept.revoke_time is None) for kept in store.keys.all()} == {("", False), ("bob", True)}
    store.keys.forget("bob")
    # Keys stay required once there was one.
    assert store.keys.credentials() == Credentials({}, closed=True, mark=(2, 2))


def test_conversations_expire_by_their_last_message_or_vote(store: Store) -> None:
    now = store._db.now()
    ids = {}
    for name, message_age, vote_age in (("new", 1, 1), ("old", 31, 31), ("voted", 31, 29), ("chosen", 31, 29)):
        ids[name] = conversation_id = store.conversations.create("ann", name)
        if name == "chosen":
            store.feedback.submit_choice("ann", comparison(store, conversation_id), "A")
        else:
            store.feedback.submit_thumb("ann", answer(store, conversation_id), up=True)
        store._db.execute(
            "UPDATE conversations SET update_time = ? WHERE id = ?", [now - message_age * DAY, conversation_id]
        )
        store._db.execute(
            "UPDATE feedback SET create_time = ? WHERE event_seq = ?",
            [now - vote_age * DAY, store.snapshots.watermark()],
        )
    assert store.deletion.expire(30)
    assert not store.deletion.expire(30)
    assert {conversation.title for conversation in store.conversations.page("ann", 9)} == {"new", "voted", "chosen"}
    with pytest.raises(NotFoundError):
        store.conversations.turns("ann", ids["old"])


def test_expired_conversations_are_deleted_in_steps(store: Store) -> None:
    for _ in range(STEP + 1):
        store.conversations.create("ann", "hello")
    store._db.execute("UPDATE conversations SET update_time = 0")
    assert store.deletion.expire(30)
    assert len(store.conversations.page("ann", 99)) == 1
    assert store.deletion.expire(30)
    assert store.conversations.page("ann", 99) == []
