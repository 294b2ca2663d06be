"""Pairs to review: who is given which, and that a choice on one is a vote like any other."""

from dataclasses import replace

import pytest

from server.shared.errors import NotFoundError
from server.store.chats.records import OfferedAnswer, OfferedReview
from server.store.chats.reviews import Purpose, withdraw_reviews
from server.store.store import Store
from tests.server.store.test_lineage import lease
from tests.server.store.test_store import answer

NEW = OfferedAnswer("v0001", [7, 8], [-0.5, -0.25], "new", "stop")
OLD = OfferedAnswer("v0000", [9], [-1.0], "old", "length")
PAIR = OfferedReview(None, "", [{"role": "user", "content": "Why?"}], [1, 2, 3], (NEW, OLD), 0.85, 8)


def offer(store: Store, *pairs: OfferedReview, purpose: Purpose = "canary") -> str:
    """A round that offers these pairs."""
    fence = lease(store)
    round_id = store.rounds.create(0, {}, reference_version="v0000", fence=fence).id
    store.reviews.offer(round_id, purpose, pairs, fence=fence)
    return round_id


def asked(content: str, **changes: object) -> OfferedReview:
    return replace(PAIR, messages=[{"role": "user", "content": content}], **changes)  # type: ignore[arg-type]


def given(store: Store, user: str) -> str | None:
    """The message of the pair that the user is given."""
    review = store.reviews.next(user)
    return review.messages[-1]["content"] if review else None


def choose(store: Store, user: str) -> None:
    review = store.reviews.next(user)
    assert review
    store.feedback.submit_choice(user, review.comparison.id, "A")


def test_a_pair_is_a_comparison_of_whole_answers(store: Store) -> None:
    offer(store, PAIR)
    review = store.reviews.next("ann")
    assert review
    comparison = review.comparison
    assert (review.messages, comparison.state, comparison.user) == (PAIR.messages, "open", "ann")
    by_version = {answer.policy_version: answer for answer in (comparison.a, comparison.b)}
    new = by_version["v0001"]
    assert (new.status, new.text, new.token_ids, new.logprobs) == ("finished", "new", [7, 8], [-0.5, -0.25])
    assert (new.prompt_token_ids, new.temperature, new.max_tokens) == ([1, 2, 3], 0.85, 8)
    assert [(span.start, span.end, span.policy_version) for span in new.spans] == [(0, 2, "v0001")]
    assert by_version["v0000"].finish_reason == "length"


def test_a_review_belongs_to_the_system_prompt_that_the_model_read(store: Store) -> None:
    """It is not shown, but another model has to read it, too."""
    offer(store, asked("why?", system="be brief"))
    review = store.reviews.next("ann")
    assert review
    assert review.messages == [{"role": "user", "content": "why?"}]
    assert store.conversations.get("ann", review.comparison.conversation_id).system == "be brief"


def test_which_answer_is_a_is_random(store: Store) -> None:
    offer(store, PAIR)
    first = set()
    for number in range(40):
        review = store.reviews.next(f"user{number}")
        assert review
        first.add(review.comparison.a.policy_version)
    assert first == {"v0000", "v0001"}


def test_a_user_is_given_the_same_pair_until_it_is_chosen_or_skipped(store: Store) -> None:
    offer(store, asked("one"), asked("two"), asked("three"))
    first = store.reviews.next("ann")
    assert first
    assert (store.reviews.next("ann"), store.reviews.waiting("ann")) == (first, 3)
    store.feedback.submit_choice("ann", first.comparison.id, "B")
    second = store.reviews.next("ann")
    assert second
    assert (second.messages[-1]["content"], store.reviews.waiting("ann")) == ("two", 2)
    store.reviews.skip("ann", second.comparison.id)
    assert (given(store, "ann"), store.reviews.waiting("ann")) == ("three", 1)
    choose(store, "ann")
    assert (given(store, "ann"), store.reviews.waiting("ann")) == (None, 0)


def test_pairs_that_few_have_seen_come_first(store: Store) -> None:
    offer(store, asked("one"), asked("two"))
    assert [given(store, user) for user in ("ann", "bob", "cem")] == ["one", "two", "one"]


def test_a_prompt_of_a_user_is_given_to_nobody_else(store: Store) -> None:
    conversation = store.conversations.create("ann", "mine")
    offer(store, asked("pool"), asked("mine", conversation_id=conversation, user="ann"))
    assert [given(store, user) for user in ("bob", "ann")] == ["pool", "mine"]
    assert (store.reviews.waiting("bob"), store.reviews.waiting("ann")) == (1, 2)


def test_another_user_cannot_skip_a_pair(store: Store) -> None:
    offer(store, PAIR)
    review = store.reviews.next("ann")
    assert review
    with pytest.raises(NotFoundError):
        store.reviews.skip("bob", review.comparison.id)


def test_a_choice_is_a_vote_and_the_prompt_is_none_of_the_users(store: Store) -> None:
    answer(store, store.conversations.create("ann", "hello"))
    offer(store, PAIR)
    choose(store, "ann")
    [vote] = store.snapshots.take().choices
    assert {vote.a.policy_version, vote.b.policy_version} == {"v0000", "v0001"}
    assert [prompt.token_ids for prompt in store.snapshots.prompts()] == [[1, 2, 70_000]]


def test_reviews_are_apart_from_the_users_chats(store: Store) -> None:
    chat = store.conversations.create("ann", "hello")
    offer(store, PAIR)
    choose(store, "ann")
    assert [conversation.id for conversation in store.conversations.page("ann")] == [chat]
    assert store.conversations.count("ann") == 1
    [review, _] = store.conversations.page("ann", kinds=("chat", "review"))
    assert (review.kind, review.title) == ("review", "Why?")


def test_withdrawn_pairs_are_given_to_nobody_and_their_votes_stay(store: Store) -> None:
    offer(store, asked("one"), asked("two"))
    choose(store, "ann")
    withdraw_reviews(store._db, "canary")
    assert (given(store, "ann"), given(store, "bob"), store.reviews.waiting("bob")) == (None, None, 0)
    assert len(store.snapshots.take().choices) == 1


def test_a_pair_that_was_left_open_gives_way_to_those_of_the_next_round(store: Store) -> None:
    offer(store, asked("one"))
    given(store, "ann")
    withdraw_reviews(store._db, "canary")
    assert (given(store, "ann"), store.reviews.waiting("ann")) == (None, 0)
    offer(store, asked("two"))
    assert (given(store, "ann"), store.reviews.waiting("ann")) == ("two", 1)


def test_all_choices_on_one_prompt_are_on_one_side(store: Store) -> None:
    conversation = store.conversations.create("ann", "mine")
    offer(store, asked("pool"))
    for user in ("ann", "bob"):
        choose(store, user)
    offer(store, asked("pool"), asked("mine", conversation_id=conversation))
    for user in ("ann", "bob"):
        for _ in range(2):
            choose(store, user)
    votes = store.snapshots.take().choices
    assert [vote.conversation_id for vote in votes if vote.a.prompt_token_ids].count(conversation) == 2
    # Those on the pool's prompt, of both rounds, belong together.
    assert len({vote.conversation_id for vote in votes}) == 2


def test_a_resumed_round_offers_its_pairs_once(store: Store) -> None:
    fence = lease(store)
    round_id = store.rounds.create(0, {}, reference_version="v0000", fence=fence).id
    for _ in range(2):
        store.reviews.offer(round_id, "canary", [asked("one"), asked("two")], fence=fence)
        choose(store, "ann")
    assert (given(store, "ann"), store.reviews.waiting("bob")) == (None, 2)


def test_what_a_canary_waits_for_comes_before_pairs_to_learn_from(store: Store) -> None:
    offer(store, asked("to learn from"), purpose="learn")
    offer(store, asked("to decide"))
    assert (given(store, "ann"), store.reviews.waiting("ann")) == ("to decide", 2)
    # The end of one leaves the other.
    withdraw_reviews(store._db, "canary")
    assert (given(store, "ann"), store.reviews.waiting("ann")) == ("to learn from", 1)


def test_the_next_rounds_pairs_replace_those_that_nobody_took(store: Store) -> None:
    offer(store, asked("old"), purpose="learn")
    choose(store, "ann")
    offer(store, asked("new"), purpose="learn")
    assert (given(store, "bob"), store.reviews.waiting("bob")) == ("new", 1)
    assert len(store.snapshots.take().choices) == 1


def test_a_deleted_conversation_takes_the_reviews_of_its_prompts_with_it(store: Store) -> None:
    conversation, other = (store.conversations.create("ann", name) for name in ("mine", "other"))
    # People here may see each other's prompts.
    offer(store, asked("mine", conversation_id=conversation), asked("other", conversation_id=other))
    choose(store, "bob")
    store.conversations.delete("ann", conversation)
    assert store.conversations.page("bob", kinds=("review",)) == []
    assert (store.snapshots.take().choices, given(store, "bob")) == ([], "other")


def test_a_conversation_that_was_deleted_while_its_answers_were_sampled_is_left_out(store: Store) -> None:
    conversation = store.conversations.create("ann", "mine")
    store.conversations.delete("ann", conversation)
    offer(store, asked("mine", conversation_id=conversation, user="ann"), asked("pool"))
    assert (given(store, "ann"), store.reviews.waiting("ann")) == ("pool", 1)


def test_a_forgotten_user_leaves_no_review(store: Store) -> None:
    conversation = store.conversations.create("ann", "mine")
    offer(store, asked("mine", conversation_id=conversation, user="ann"), asked("pool"))
    choose(store, "ann")
    given(store, "ann")
    while store.deletion.step("ann"):
        pass
    assert store.conversations.page("ann", kinds=("chat", "review")) == []
    assert store._db.rows("SELECT * FROM reviewed") == []
    assert [row["user"] for row in store._db.rows("SELECT user FROM reviews")] == [""]


def test_reviews_of_one_question_belong_together_whatever_its_tokens(store: Store) -> None:
    offer(store, asked("Why?"), asked("Why?", prompt_token_ids=[7, 8, 9]), asked("How?", prompt_token_ids=[7, 8, 9]))
    for _ in range(3):
        choose(store, "ann")
    first, second, third = store.snapshots.take().choices
    assert first.conversation_id == second.conversation_id != third.conversation_id
