"""The store on a real file: votes, history, what the learner sees, leases."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from server.shared.errors import (
    ConflictError,
    DataDirectoryError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from server.store.chats import snapshots
from server.store.chats.histories import OwnHistory
from server.store.chats.records import Generation, Span, VoteCount
from server.store.keys import sha256
from server.store.store import Store
from tests.server.conftest import register
from tests.server.store.conftest import on_sqlite

DONE = Generation([5, 6, 7], [-0.5, -1.0, -0.25], "hi there", "stop", [Span(0, 1, "v0000"), Span(1, 3, "v0001", True)])
CUT = Generation([5], [-0.5], "hi", "cancelled", [Span(0, 1, "v0000")])


def answer(store: Store, conversation_id: str, user: str = "ann", generation: Generation = DONE) -> str:
    response_id = store.responses.begin(
        user,
        conversation_id,
        message="hello",
        replica_id="here",
        policy_version="v0000",
        prompt_token_ids=[1, 2, 70_000],
        temperature=0.85,
        max_tokens=8,
        seed=2**62,
    )
    store.responses.finish(response_id, generation)
    return response_id


def comparison(store: Store, conversation_id: str, user: str = "ann", b: Generation = DONE) -> str:
    comparison_id, first, second = store.responses.begin_comparison(
        user,
        conversation_id,
        message="which",
        replica_id="here",
        policy_versions=("v0000", "v0000"),
        prompt_token_ids=[1, 2],
        temperatures=(1.0, 0.7),
        max_tokens=8,
        seeds=(None, None),
    )
    store.responses.finish(first, DONE)
    store.responses.finish(second, b)
    return comparison_id


def test_a_response_is_stored_token_by_token(store: Store) -> None:
    response = store.responses.get("ann", answer(store, store.conversations.create("ann", "hello")))
    assert response.prompt_token_ids == [1, 2, 70_000]
    assert response.token_ids == [5, 6, 7]
    assert response.logprobs == [-0.5, -1.0, -0.25]
    assert response.seed == 2**62
    assert response.spans == [Span(0, 1, "v0000", False), Span(1, 3, "v0001", True)]
    assert (response.status, response.finish_reason) == ("finished", "stop")


def test_data_on_disk_survives_a_killed_process(tmp_path: Path) -> None:
    first = Store.open(tmp_path)
    vote = first.feedback.submit_thumb("ann", answer(first, first.conversations.create("ann", "hello")), up=True)
    # Not closed, as after a kill.
    second = Store.open(tmp_path)
    assert [thumb.feedback_id for thumb in second.snapshots.take().thumbs] == [vote.id]
    second.close()
    first.close()


def test_voting_again_replaces_the_vote_and_the_log_keeps_both(store: Store) -> None:
    response_id = answer(store, store.conversations.create("ann", "hello"))
    up = store.feedback.submit_thumb("ann", response_id, up=True)
    down = store.feedback.submit_thumb("ann", response_id, up=False, comment="dull")
    assert up.id == down.id
    assert [(vote.value, vote.comment) for vote in store.feedback.page("ann", 10)] == [("DOWN", "dull")]
    assert store.snapshots.watermark() == 2
    assert [thumb.value for thumb in store.snapshots.take(1).thumbs] == [1]
    assert [thumb.value for thumb in store.snapshots.take(2).thumbs] == [-1]


def test_limits_select_the_newest_votes_and_prompts(store: Store) -> None:
    given = [
        store.feedback.submit_thumb("ann", answer(store, store.conversations.create("ann", "hello")), up=True)
        for _ in range(4)
    ]
    # The oldest one is changed last, so it becomes the newest.
    store.feedback.submit_thumb("ann", str(given[0].response_id), up=False)
    newest = store.snapshots.take(limit=3)
    assert [thumb.feedback_id for thumb in newest.thumbs] == [given[2].id, given[3].id, given[0].id]
    assert [thumb.feedback_id for thumb in store.snapshots.take(4, limit=2).thumbs] == [given[2].id, given[3].id]
    assert len(store.snapshots.prompts(limit=1)) == len(store.snapshots.prompts()) == 1


@on_sqlite
def test_votes_by_day_are_counted_from_the_index_only(store: Store) -> None:
    given = [
        store.feedback.submit_thumb(user, answer(store, store.conversations.create(user, "hello"), user), up=True)
        for user in ("ann", "bob", "ann")
    ]
    # The last second of 13 March 2026 UTC and the first of the 14th, and a day long before.
    for vote, seconds in zip(given, (1_773_446_399, 1_773_446_400, 0), strict=True):
        store._db.execute("UPDATE feedback SET create_time = ? WHERE id = ?", [seconds, vote.id])
    asked: list[str] = []
    store._db._db.conn.set_trace_callback(asked.append)
    counts = store.feedback.count_by_day(30_000)
    store._db._db.conn.set_trace_callback(None)
    assert counts == [
        VoteCount("1970-01-01", "thumb", 1), VoteCount("2026-03-13", "thumb", 1), VoteCount("2026-03-14", "thumb", 1)
    ]  # fmt: skip
    [plan] = [row["detail"] for row in store._db.rows(f"EXPLAIN QUERY PLAN {asked[-1]}") if "feedback" in row["detail"]]
    assert plan == "SEARCH feedback USING INDEX feedback_by_day (<expr>>?)"
    # In the index's order, without sorting first.
    steps = [row["detail"] for row in store._db.rows(f"EXPLAIN QUERY PLAN {asked[-1]}")]
    assert "USE TEMP B-TREE FOR GROUP BY" not in steps
    query = "SELECT count(*) AS votes FROM feedback WHERE event_seq > 0 AND kind != 'demonstration'"
    [plan] = [row["detail"] for row in store._db.rows(f"EXPLAIN QUERY PLAN {query}")]
    assert plan == "SEARCH feedback USING COVERING INDEX feedback_by_event (event_seq>?)"


def test_votes_are_counted_once_and_only_while_current(store: Store) -> None:
    response_ids = [answer(store, store.conversations.create("ann", "hello")) for _ in range(3)]
    first, second, _ = [store.feedback.submit_thumb("ann", response_id, up=True) for response_id in response_ids]
    store.feedback.submit_demonstration(
        "ann", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    before = store.snapshots.watermark()
    assert (store.snapshots.count_votes(), store.snapshots.count_votes(before)) == (3, 0)
    store.feedback.submit_thumb("ann", str(first.response_id), up=False)
    store.feedback.retract("ann", second.id)
    assert (store.snapshots.count_votes(), store.snapshots.count_votes(before)) == (2, 1)


def test_a_retracted_vote_is_not_learned_from(store: Store) -> None:
    vote = store.feedback.submit_thumb("ann", answer(store, store.conversations.create("ann", "hello")), up=True)
    with pytest.raises(NotFoundError):
        store.feedback.retract("bob", vote.id)
    store.feedback.retract("ann", vote.id)
    assert len(store.snapshots.take()) == 0
    assert store.feedback.page("ann", 10) == []
    with pytest.raises(NotFoundError):
        store.feedback.retract("ann", vote.id)


NOTHING = Generation([2], [-0.5], "", "stop", [Span(0, 1, "v0000")])
FAILED = Generation([], [], "", "error", [])


def test_an_empty_finished_answer_counts_as_an_answer(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    response_id = answer(store, conversation_id, generation=NOTHING)
    assert store.feedback.submit_thumb("ann", response_id, up=False).value == "DOWN"
    assert store.feedback.submit_correction("ann", response_id, "Hello!").value == "Hello!"
    comparison_id = comparison(store, conversation_id, b=NOTHING)
    assert store.feedback.submit_choice("ann", comparison_id, "B").value == "B"
    # The model reads its messages, too.
    assert [turn.answer for turn in store.conversations.turns("ann", conversation_id)] == ["", ""]
    assert len(store.snapshots.take()) == 3


def test_an_answer_that_failed_without_text_does_not_count(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    response_id = answer(store, conversation_id, generation=FAILED)
    with pytest.raises(FailedPreconditionError, match="no answer yet"):
        store.feedback.submit_thumb("ann", response_id, up=True)
    assert [turn.answer for turn in store.conversations.turns("ann", conversation_id)] == [None]


def test_users_cannot_read_or_vote_on_others_data(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    response_id, comparison_id = answer(store, conversation_id), comparison(store, conversation_id)
    for attempt in (
        lambda: store.feedback.submit_thumb("bob", response_id, up=True),
        lambda: store.feedback.submit_correction("bob", response_id, "better"),
        lambda: store.feedback.submit_choice("bob", comparison_id, "A"),
        lambda: store.conversations.turns("bob", conversation_id),
        lambda: store.conversations.delete("bob", conversation_id),
    ):
        with pytest.raises(NotFoundError):
            attempt()
    assert store.snapshots.watermark() == 0


@pytest.mark.parametrize(
    ("choice", "continued_with", "dropped"),
    [("A", "A", False), ("B", "B", False), ("BOTH_BAD", None, True)],
)
def test_the_first_choice_decides_how_the_conversation_continues(store: Store, choice, continued_with, dropped) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    comparison_id = comparison(store, conversation_id)
    store.feedback.submit_choice("ann", comparison_id, choice)
    [turn] = store.conversations.turns("ann", conversation_id)
    assert (turn.comparison.continued_with, turn.dropped) == (continued_with, dropped)
    assert turn.answer == (None if dropped else "hi there")
    # A later change changes the vote, not the history.
    store.feedback.submit_choice("ann", comparison_id, "TIE")
    [turn] = store.conversations.turns("ann", conversation_id)
    assert (turn.comparison.continued_with, turn.dropped) == (continued_with, dropped)
    assert [vote.choice for vote in store.snapshots.take().choices] == ["TIE"]


def test_a_tie_continues_with_a_random_recorded_answer(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    for _ in range(40):
        store.feedback.submit_choice("ann", comparison(store, conversation_id), "TIE")
    drawn = [turn.comparison.continued_with for turn in store.conversations.turns("ann", conversation_id)]
    # 40 equal draws happen once in 5e11 runs.
    assert set(drawn) == {"A", "B"}


def test_a_skipped_comparison_can_still_be_voted_on(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    comparison_id = comparison(store, conversation_id)
    store.responses.skip_open_comparisons(conversation_id)
    assert store.responses.comparison("ann", comparison_id).state == "skipped"
    store.feedback.submit_choice("ann", comparison_id, "B")
    found = store.responses.comparison("ann", comparison_id)
    assert (found.state, found.continued_with) == ("chosen", "A")
    assert [vote.choice for vote in store.snapshots.take().choices] == ["B"]


def test_a_comparison_that_was_not_finished_cannot_be_chosen(store: Store) -> None:
    comparison_id = comparison(store, store.conversations.create("ann", "hello"), b=CUT)
    with pytest.raises(FailedPreconditionError) as error:
        store.feedback.submit_choice("ann", comparison_id, "A")
    assert error.value.reason == "COMPARISON_UNFINISHED"
    assert store.snapshots.watermark() == 0


def test_a_deleted_conversation_leaves_no_text_behind(store: Store, tmp_path: Path) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    store.feedback.submit_thumb("ann", answer(store, conversation_id), up=True, comment="marvellous")
    store.feedback.submit_choice("ann", comparison(store, conversation_id), "A", comment="splendid")
    before = store.snapshots.watermark()
    store.conversations.delete("ann", conversation_id)
    assert len(store.snapshots.take()) == len(store.snapshots.take(before)) == 0
    assert store.conversations.page("ann", 10) == []
    left = store._db.rows("SELECT * FROM feedback_events WHERE comment IS NOT NULL OR value IS NOT NULL")
    assert left == []
    assert store._db.rows("SELECT * FROM responses") == []
    assert store._db.rows("SELECT * FROM spans") == []


def test_interrupted_answers_are_marked_at_the_next_start(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    for replica in ("here", "gone", "elsewhere"):
        store.responses.begin(
            "ann", conversation_id, message="m", replica_id=replica, policy_version="v0000", prompt_token_ids=[1],
            temperature=1.0, max_tokens=4, seed=None,
        )  # fmt: skip
    store.replicas.report("elsewhere", "v0000")

    def statuses() -> list[str]:
        return [turn.response.status for turn in store.conversations.turns("ann", conversation_id) if turn.response]

    # A running server never fails its own answers, even if its heartbeat is late.
    assert store.responses.fail_interrupted("here") == 1
    assert statuses() == ["streaming", "failed", "streaming"]
    assert store.responses.fail_interrupted("here", starting=True) == 1
    assert statuses() == ["failed", "failed", "streaming"]
    assert [turn.message for turn in store.conversations.turns("ann", conversation_id)] == ["m", "m", "m"]


def test_a_request_id_belongs_to_one_body(store: Store) -> None:
    store.requests.remember("ann", "Chat", "r1", b"body", b"answer")
    assert store.requests.find("ann", "Chat", "r1", b"body") == b"answer"
    assert store.requests.find("bob", "Chat", "r1", b"body") is None
    assert store.requests.find("ann", "Compare", "r1", b"body") is None
    with pytest.raises(InvalidArgumentError) as error:
        store.requests.find("ann", "Chat", "r1", b"other")
    assert error.value.reason == "REQUEST_ID_REUSED"


def test_prompts_come_once_each_in_the_order_they_were_asked(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    answer(store, conversation_id)
    comparison(store, conversation_id)
    answer(store, conversation_id)
    assert [prompt.token_ids for prompt in store.snapshots.prompts()] == [[1, 2, 70_000], [1, 2]]


def asked(store: Store, user: str, number: int, message: str = "hello") -> str:
    conversation_id = store.conversations.create(user, message)
    store.responses.begin(
        user, conversation_id, message=message, replica_id="here", policy_version="v0000",
        prompt_token_ids=[number], temperature=0.85, max_tokens=8, seed=None,
    )  # fmt: skip
    return conversation_id


def test_a_busy_user_does_not_displace_others_prompts(store: Store) -> None:
    for number in range(3):
        asked(store, "ann", number)
    for number in range(10, 60):
        asked(store, "busy", number)
    found = store.snapshots.prompts(limit=8)
    assert [(prompt.user, prompt.token_ids[0]) for prompt in found] == [
        *(("ann", number) for number in (0, 1, 2)), *(("busy", number) for number in (55, 56, 57, 58, 59)),
    ]  # fmt: skip
    assert [prompt.user for prompt in store.snapshots.prompts(limit=8, without=["busy"])] == ["ann"] * 3


def test_what_is_old_and_much_is_not_read_for_a_round(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        asked(store, "ann" if number < 3 else "bob", number)
    monkeypatch.setattr(snapshots, "RECENT", 4)
    assert [(one.user, one.token_ids[0]) for one in store.snapshots.prompts()] == [
        ("ann", 2), ("bob", 3), ("bob", 4), ("bob", 5),
    ]  # fmt: skip
    # Whoever is left out does not take the places of others.
    assert [one.token_ids[0] for one in store.snapshots.prompts(without=["bob"])] == [0, 1, 2]


def test_new_votes_are_counted_up_to_a_number(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(4):
        store.feedback.submit_thumb("ann", answer(store, store.conversations.create("ann", "hello")), up=True)
    assert store.snapshots.count_new_votes() == 4
    monkeypatch.setattr(snapshots, "MOST_COUNTED", 3)
    assert store.snapshots.count_new_votes() == 3
    assert store.snapshots.count_votes() == 4


def test_a_prompt_knows_the_first_conversation_that_began_like_its_own(store: Store) -> None:
    first = asked(store, "ann", 1, "What day is it?")
    other = asked(store, "ben", 2, "Hello.")
    asked(store, "ben", 3, "What day is it?")
    # A later message of a conversation goes by that.
    store.responses.begin(
        "ann", first, message="And now?", replica_id="here", policy_version="v0000",
        prompt_token_ids=[4], temperature=0.85, max_tokens=8, seed=None,
    )  # fmt: skip
    assert [prompt.opened_by for prompt in store.snapshots.prompts()] == [first, other, first, ""]


def test_a_message_after_turns_that_were_answered_elsewhere_does_not_open_a_conversation(store: Store) -> None:
    def create() -> str:
        return store.conversations.create("ann", "What day is it?")

    own = OwnHistory("", [("What day is it?", "Monday.")], "And now?")
    conversation, place = store.histories.place("ann", own, 10, create)
    store.responses.begin(
        "ann", conversation, message="And now?", replica_id="here", policy_version="v0000", place=place,
        prompt_token_ids=[4], temperature=0.85, max_tokens=8, seed=None, stop=["."],
    )  # fmt: skip
    [prompt] = store.snapshots.prompts()
    assert (prompt.opened_by, prompt.opening, prompt.stop) == ("", "", (".",))


@on_sqlite
def test_a_newer_data_directory_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store._db.insert("_sqlite_migrations", {"migration_set": "prefloop", "name": "m999_future", "applied_at": "2099"})
    store.close()
    with pytest.raises(DataDirectoryError, match=r"newer prefloop \(m999_future\); upgrade"):
        Store.open(tmp_path)


@on_sqlite
def test_a_data_directory_that_is_a_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirectoryError, match="give --data-dir a folder"):
        Store.open(tmp_path / "file")


def test_the_pointer_moves_by_compare_and_set_and_keeps_its_history(store: Store) -> None:
    register(store, "v0001")
    with pytest.raises(ConflictError, match="v0000 is active, not v0007"):
        store.policies.activate("v0001", actor="ann", expected_active_version="v0007")
    store.policies.activate("v0001", actor="ann", expected_active_version="v0000")
    assert store.policies.active().version == "v0001"
    assert store.policies.get("v0000").state == "retired"
    assert store.policies.previous_version() == "v0000"


def test_a_rolled_back_version_is_not_a_rollback_target(store: Store) -> None:
    for version in ("v0001", "v0002"):
        register(store, version)
        store.policies.activate(version, actor="learner")
    store.policies.activate("v0001", actor="server", action="rollback")
    # Not to v0002, which was just rolled back.
    assert store.policies.previous_version() == "v0000"
    store.policies.activate("v0002", actor="ann", action="promote")
    store.policies.activate("v0001", actor="ann")
    assert store.policies.previous_version() == "v0002"


def test_a_version_that_cannot_be_loaded_moves_the_pointer_back(store: Store) -> None:
    register(store, "v0001")
    store.policies.activate("v0001", actor="ann")
    store.policies.fail("v0001", "a tensor is missing", "v0000")
    assert store.policies.active().version == "v0000"
    assert (store.policies.get("v0001").state, store.policies.get("v0001").reason) == ("failed", "a tensor is missing")
    with pytest.raises(FailedPreconditionError):
        store.policies.activate("v0001", actor="ann")


def register_lineage(store: Store, reference: str, *versions: str) -> None:
    for version in (reference, *versions):
        store.policies.register(
            version, kind="full", state="candidate", parent_version=None, reference_version=reference, round_id=None,
            reward_model_version=None, metrics={},
        )  # fmt: skip


def test_no_reference_is_marked_as_failed(store: Store) -> None:
    register_lineage(store, "v0001", "v0002")
    store.policies.activate("v0001", actor="ann")
    store.policies.fail("v0001", "a tensor is missing", "v0000")
    assert (store.policies.active().version, store.policies.get("v0001").state) == ("v0001", "active")
    store.policies.activate("v0002", actor="ann")
    store.policies.fail("v0002", "a tensor is missing", "v0001")
    assert (store.policies.active().version, store.policies.get("v0002").state) == ("v0001", "failed")


def test_the_version_of_a_lineage_that_was_served_last(store: Store) -> None:
    assert (store.policies.reference(), store.policies.last_served("v0001")) == ("v0000", None)
    register(store, "v0001")
    register(store, "v0002")
    for version in ("v0001", "v0002"):
        store.policies.activate(version, actor="ann")
    store.policies.activate("v0001", actor="ann", action="rollback")
    register_lineage(store, "v0003", "v0004")
    assert store.policies.last_served("v0003") is None
    store.policies.activate("v0004", actor="ann")
    assert (store.policies.reference(), store.policies.last_served("v0000")) == ("v0003", "v0001")
    store.policies.fail("v0004", "a tensor is missing", "v0003")
    assert store.policies.last_served("v0003") == "v0003"
    assert store.policies.origins() == {
        "v0000": "v0000", "v0001": "v0000", "v0002": "v0000", "v0003": "v0003", "v0004": "v0003",
    }  # fmt: skip


def fine_tuned(store: Store, version: str, parent: str) -> None:
    """A reference of its own, of the model of its parent."""
    store.policies.register(
        version, kind="full", state="candidate", parent_version=parent, reference_version=version, round_id=None,
        reward_model_version=None, metrics={},
    )  # fmt: skip


def test_one_model_may_have_several_references(store: Store) -> None:
    register(store, "v0001")
    fine_tuned(store, "v0002", "v0001")
    store.policies.register(
        "v0003", kind="adapter", state="candidate", parent_version="v0002", reference_version="v0002", round_id=None,
        reward_model_version=None, metrics={},
    )  # fmt: skip
    register_lineage(store, "v0004", "v0005")
    fine_tuned(store, "v0006", "v0005")
    assert store.policies.origins() == {
        "v0000": "v0000", "v0001": "v0000", "v0002": "v0000", "v0003": "v0000",
        "v0004": "v0004", "v0005": "v0004", "v0006": "v0004",
    }  # fmt: skip
    for version in ("v0001", "v0002", "v0003", "v0006"):
        store.policies.activate(version, actor="ann")
    assert (store.policies.reference(), store.policies.origin()) == ("v0006", "v0004")
    assert [store.policies.last_served(origin) for origin in ("v0000", "v0004")] == ["v0003", "v0006"]
    # Going to another model was no rollback of v0003; going back from v0006 to v0005's model is one of v0006.
    store.policies.activate("v0003", actor="ann", action="rollback")
    assert store.lineage.rolled_back(math.inf) == set()
    store.policies.activate("v0001", actor="ann", action="rollback")
    assert store.lineage.rolled_back(math.inf) == {"v0003"}


def test_a_reference_is_pruned_once_nothing_is_left_of_it(store: Store) -> None:
    fine_tuned(store, "v0001", "v0000")
    store.policies.register(
        "v0002", kind="adapter", state="candidate", parent_version="v0001", reference_version="v0001", round_id=None,
        reward_model_version=None, metrics={},
    )  # fmt: skip
    assert not store.policies.prune("v0001")
    assert store.policies.prune("v0002")
    assert store.policies.prune("v0001")
    # What was made from the model stays.
    fine_tuned(store, "v0003", "v0000")
    store.policies.activate("v0003", actor="ann")
    assert not store.policies.prune("v0000")


def test_a_fine_tuned_reference_that_cannot_be_loaded_has_failed(store: Store) -> None:
    fine_tuned(store, "v0001", "v0000")
    store.policies.activate("v0001", actor="ann")
    store.policies.fail("v0001", "a tensor is missing", "v0000")
    assert (store.policies.active().version, store.policies.get("v0001").state) == ("v0000", "failed")


def test_scores_are_of_any_reference_of_the_model(store: Store) -> None:
    fine_tuned(store, "v0001", "v0000")
    register_lineage(store, "v0002")
    fence = store.leases.acquire("learner", "here", 60)
    assert fence
    for number, reference in enumerate(("v0000", "v0001", "v0002")):
        store.reward_models.register(
            f"rm000{number}", reference_version=reference, round_id=None, metrics={}, fence=fence
        )
    assert [store.reward_models.reads(f"rm000{number}", "v0000") for number in range(3)] == [True, True, False]
    assert not store.reward_models.reads("rm0009", "v0000")


def test_a_round_whose_version_could_not_be_loaded_after_all_is_rejected(store: Store) -> None:
    """It had ended, because it did not wait that long."""
    fence = store.leases.acquire("learner", "here", 60)
    assert fence
    round_ = store.rounds.create(0, {}, reference_version="v0000", kind="sft", fence=fence)
    fine_tuned(store, "v0001", "v0000")
    store.policies.activate("v0001", actor="learner")
    store.rounds.update(round_.id, policy_version="v0001", fence=fence)
    store.rounds.finish(round_.id, "promoted", fence=fence)
    store.policies.fail("v0001", "no memory", "v0000")
    found = store.rounds.get(round_.id)
    assert (found.state, found.reason) == ("rejected", "v0001 was activated and then reverted: no memory")


def test_demonstrations_are_no_new_votes(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    response = answer(store, conversation_id)
    thumb = store.feedback.submit_thumb("ann", response, up=True)
    before = store.snapshots.watermark()
    store.feedback.submit_demonstration(
        "ann", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert (store.snapshots.votes_changed(before), store.snapshots.count_examples(before)) == (False, {"ann": 1})
    store.feedback.submit_correction("ann", response, "better")
    assert (store.snapshots.votes_changed(before), store.snapshots.count_examples(before)) == (True, {"ann": 2})
    before = store.snapshots.watermark()
    store.feedback.retract("ann", thumb.id)
    assert store.snapshots.votes_changed(before)


def test_another_model_has_learned_from_no_vote(store: Store) -> None:
    conversation_id = store.conversations.create("ann", "hello")
    store.feedback.submit_thumb("ann", answer(store, conversation_id), up=True)
    fence = store.leases.acquire("learner", "here", 60)
    assert fence
    round_ = store.rounds.create(store.snapshots.watermark(), {}, reference_version="v0000", fence=fence)
    store.rounds.finish(round_.id, "rejected")
    assert (store.rounds.last_learned(), store.snapshots.count_new_votes()) == (store.rounds.get(round_.id), 0)
    register_lineage(store, "v0001")
    store.policies.activate("v0001", actor="ann")
    assert (store.rounds.last_learned(), store.snapshots.count_new_votes()) == (None, 1)
    # An operator may go back to the other model just before a round begins.
    with pytest.raises(ConflictError, match=r"v0001 of another reference is active since; nothing was changed\."):
        store.rounds.create(1, {}, reference_version="v0000", fence=fence)
    store.policies.activate("v0000", actor="ann")
    assert store.snapshots.count_new_votes() == 0


def test_the_origin_is_read_without_changing_anything(store: Store, tmp_path: Path) -> None:
    assert Store.peek_origin(tmp_path) == "v0000"
    register_lineage(store, "v0001", "v0002")
    store.policies.activate("v0002", actor="ann")
    assert Store.peek_origin(tmp_path) == "v0001"


@on_sqlite
def test_no_origin_is_read_where_there_is_no_database(tmp_path: Path) -> None:
    assert Store.peek_origin(tmp_path / "nowhere") is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prefloop.db").write_bytes(b"not a database")
    assert Store.peek_origin(tmp_path / "other") is None
    assert (tmp_path / "other" / "prefloop.db").read_bytes() == b"not a database"


def test_a_learner_whose_lease_expired_writes_nothing(store: Store) -> None:
    first = store.leases.acquire("round", "first", seconds=-1.0)
    second = store.leases.acquire("round", "second", seconds=60.0)
    assert first is not None
    assert second is not None
    assert second.token == first.token + 1
    assert store.leases.acquire("round", "third", seconds=60.0) is None
    register(store, "v0001")
    for attempt in (
        lambda: store.policies.activate("v0001", actor="first", fence=first),
        lambda: store.rounds.create(0, {}, reference_version="v0000", fence=first),
        lambda: store.leases.renew(first, 60.0),
    ):
        with pytest.raises(ConflictError, match="went to second"):
            attempt()
    assert store.policies.active().version == "v0000"
    assert store.rounds.page() == []


def test_versions_are_in_the_order_of_their_numbers(store: Store) -> None:
    register(store, "v9999")
    register(store, "v10000")
    assert [policy.version for policy in store.policies.page()] == ["v10000", "v9999", "v0000"]


@on_sqlite
def test_a_votes_cost_is_independent_of_the_number_of_votes(store: Store) -> None:
    conversation = store.conversations.create("ann", "hello")
    response_id, comparison_id = answer(store, conversation), comparison(store, conversation)
    before = [steps(store, lambda: store.feedback.submit_thumb("ann", response_id, up=True)) for _ in range(2)][-1]
    before += [steps(store, lambda: store.feedback.submit_choice("ann", comparison_id, "A")) for _ in range(2)][-1]
    for _ in range(200):
        store.feedback.submit_thumb("ann", answer(store, conversation), up=True)
        store.feedback.submit_choice("ann", comparison(store, conversation), "B")
    after = steps(store, lambda: store.feedback.submit_thumb("ann", response_id, up=False))
    after += steps(store, lambda: store.feedback.submit_choice("ann", comparison_id, "B"))
    assert after < before * 1.5


def steps(store: Store, work: Callable[[], object]) -> int:
    """How many instructions SQLite's virtual machine runs for it, in tens."""
    count = itertools.count()
    connection = store._db._db.conn
    connection.set_progress_handler(lambda: next(count) * 0, 10)
    work()
    connection.set_progress_handler(None, 10)
    return next(count)


def test_who_was_deleted_is_remembered_for_an_hour_and_not_by_name(store: Store) -> None:
    store.keys.forget("ann")
    store.keys.forget("bob")
    assert [(one.seq, one.user_sha256) for one in store.keys.forgotten(0)] == [
        (1, sha256("ann")), (2, sha256("bob")),
    ]  # fmt: skip
    store._db.execute("UPDATE forgotten SET create_time = create_time - 3601 WHERE seq = 1")
    first, second = store.keys.forgotten(0)
    assert 3600.1 <= first.age < 3630
    assert 0 <= second.age < 30
    store.keys.drop_forgotten()
    assert [one.seq for one in store.keys.forgotten(0)] == [2]
    store._db.execute("UPDATE forgotten SET create_time = 0")
    store.keys.drop_forgotten()
    store.keys.forget("cid")
    assert [one.seq for one in store.keys.forgotten(2)] == [3]
