"""Reviews over gRPC: blind until the choice, and no chat."""

from typing import Any

from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2, review_pb2

from tests.server.conftest import Running
from tests.server.rpc.test_rpcs import ANN, refusal
from tests.server.store.test_reviews import asked, offer

BOB = (("x-user-id", "bob"),)


async def get(running: Running, user: Any = ANN) -> review_pb2.GetReviewResponse:
    found: review_pb2.GetReviewResponse = await running.reviews.GetReview(review_pb2.GetReviewRequest(), metadata=user)
    return found


async def test_pairs_are_given_one_after_another(running: Running) -> None:
    nothing = await get(running)
    assert (nothing.HasField("review"), nothing.waiting) == (False, 0)
    await running.store(lambda store: offer(store, asked("one"), asked("two")))
    first = await get(running)
    assert (first.review.messages[0].content, first.waiting) == ("one", 2)
    assert first.review.messages[0].role == feedback_pb2.ROLE_USER
    assert (await get(running)) == first
    skip = review_pb2.SkipReviewRequest(comparison_id=first.review.comparison.comparison_id)
    await running.reviews.SkipReview(skip, metadata=ANN)
    # Once more, as a client that heard no answer would.
    await running.reviews.SkipReview(skip, metadata=ANN)
    second = await get(running)
    assert (second.review.messages[0].content, second.waiting) == ("two", 1)
    code, _, _ = await refusal(running.reviews.SkipReview(skip, metadata=BOB))
    assert code.name == "NOT_FOUND"


async def test_a_pair_is_blind_until_the_choice_and_then_a_vote(running: Running) -> None:
    await running.store(lambda store: offer(store, asked("one")))
    comparison = (await get(running)).review.comparison
    assert {comparison.a.text, comparison.b.text} == {"new", "old"}
    for shown in (comparison.a, comparison.b):
        assert (list(shown.spans), shown.HasField("temperature")) == ([], False)
    vote = feedback_pb2.SubmitChoiceRequest(
        comparison_id=comparison.comparison_id, choice=feedback_pb2.CHOICE_A, comment="shorter"
    )
    await running.feedback.SubmitChoice(vote, metadata=ANN)
    listed = await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(), metadata=ANN)
    assert [(one.comparison_id, one.comment) for one in listed.feedback] == [(comparison.comparison_id, "shorter")]
    chats = await running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=ANN)
    assert list(chats.conversations) == []
    parts = [part async for part in running.account.ExportUser(account_pb2.ExportUserRequest(), metadata=ANN)]
    [exported] = [part.conversation for part in parts if part.HasField("conversation")]
    answers = exported.turns[0].comparison
    assert sorted(span.policy_version for answer in (answers.a, answers.b) for span in answer.spans) == [
        "v0000",
        "v0001",
    ]


async def test_a_review_is_not_continued_as_a_chat(running: Running) -> None:
    await running.store(lambda store: offer(store, asked("one")))
    await get(running)
    [review] = await running.store(lambda store: store.conversations.page("ann", kinds=("review",)))
    request = chat_pb2.ChatRequest(message="And then?", conversation_id=review.id)
    code, _, _ = await refusal(running.chat.Chat(request, metadata=ANN))
    assert code.name == "FAILED_PRECONDITION"
