"""ReviewService: pairs that a round sampled, one after another."""

from typing import Any

from prefloop.v1 import feedback_pb2, review_pb2, review_pb2_grpc

from server.rpc import to_proto
from server.rpc.identity import current_user
from server.store.chats.records import Review
from server.store.store import Store
from server.store.store_thread import StoreThread


class ReviewService(review_pb2_grpc.ReviewServiceServicer):
    """The calling user's pairs to compare."""

    def __init__(self, store: StoreThread) -> None:
        self._store = store

    async def GetReview(self, request: review_pb2.GetReviewRequest, context: Any) -> review_pb2.GetReviewResponse:
        user = current_user()

        def get(store: Store) -> review_pb2.GetReviewResponse:
            with store.transaction():
                found = store.reviews.next(user)
                return review_pb2.GetReviewResponse(
                    review=_review(found) if found else None, waiting=store.reviews.waiting(user)
                )

        return await self._store(get, user)

    async def SkipReview(self, request: review_pb2.SkipReviewRequest, context: Any) -> review_pb2.SkipReviewResponse:
        user = current_user()
        await self._store(lambda store: store.reviews.skip(user, request.comparison_id), user)
        return review_pb2.SkipReviewResponse()


def _review(record: Review) -> review_pb2.Review:
    messages = [
        feedback_pb2.Message(role=to_proto.ROLE_OF[message["role"]], content=message["content"])
        for message in record.messages
    ]
    return review_pb2.Review(messages=messages, comparison=to_proto.comparison(record.comparison, []))
