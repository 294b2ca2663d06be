"""FeedbackService: a vote is acknowledged once it is on disk, and a repeated request is one vote."""

import hashlib
from collections.abc import Callable
from typing import Any

from prefloop.v1 import feedback_pb2, feedback_pb2_grpc

from server import convert, records
from server.identity import current_user
from server.metrics import VOTES
from server.paging import CHUNK, fill, in_chunks
from server.store import FeedbackStore
from server.store_thread import StoreThread


class FeedbackService(feedback_pb2_grpc.FeedbackServiceServicer):
    """Thumbs, choices, corrections and demonstrations of the calling user."""

    def __init__(self, store: StoreThread) -> None:
        self._store = store

    async def SubmitThumb(
        self, request: feedback_pb2.SubmitThumbRequest, context: Any
    ) -> feedback_pb2.SubmitThumbResponse:
        up = request.thumb == feedback_pb2.THUMB_UP
        feedback = await self._once(
            "SubmitThumb",
            request,
            context,
            lambda store, user: store.submit_thumb(user, request.response_id, up=up, comment=request.comment),
        )
        return feedback_pb2.SubmitThumbResponse(feedback=feedback)

    async def SubmitChoice(
        self, request: feedback_pb2.SubmitChoiceRequest, context: Any
    ) -> feedback_pb2.SubmitChoiceResponse:
        choice = next(name for name, value in convert.CHOICES.items() if value == request.choice)
        feedback = await self._once(
            "SubmitChoice",
            request,
            context,
            lambda store, user: store.submit_choice(user, request.comparison_id, choice, request.comment),
        )
        return feedback_pb2.SubmitChoiceResponse(feedback=feedback)

    async def SubmitCorrection(
        self, request: feedback_pb2.SubmitCorrectionRequest, context: Any
    ) -> feedback_pb2.SubmitCorrectionResponse:
        feedback = await self._once(
            "SubmitCorrection",
            request,
            context,
            lambda store, user: store.submit_correction(user, request.response_id, request.text),
        )
        return feedback_pb2.SubmitCorrectionResponse(feedback=feedback)

    async def SubmitDemonstration(
        self, request: feedback_pb2.SubmitDemonstrationRequest, context: Any
    ) -> feedback_pb2.SubmitDemonstrationResponse:
        messages = [{"role": convert.ROLES[part.role], "content": part.content} for part in request.messages]
        feedback = await self._once(
            "SubmitDemonstration", request, context, lambda store, user: store.submit_demonstration(user, messages)
        )
        return feedback_pb2.SubmitDemonstrationResponse(feedback=feedback)

    async def RetractFeedback(
        self, request: feedback_pb2.RetractFeedbackRequest, context: Any
    ) -> feedback_pb2.RetractFeedbackResponse:
        user = current_user()
        await self._store(lambda store: store.retract_feedback(user, request.feedback_id))
        return feedback_pb2.RetractFeedbackResponse()

    async def ListFeedback(
        self, request: feedback_pb2.ListFeedbackRequest, context: Any
    ) -> feedback_pb2.ListFeedbackResponse:
        user = current_user()
        size = request.page_size or convert.DEFAULT_PAGE_SIZE
        key = convert.page_key(request.page_token, (int,))

        def read(store: FeedbackStore) -> feedback_pb2.ListFeedbackResponse:
            def follow(last: records.Feedback | None) -> list[records.Feedback]:
                return store.feedback(user, CHUNK, last.event_seq if last else key and key[0])

            entries = (([vote.event_seq], convert.feedback(vote)) for vote in in_chunks(follow))
            page, more = fill(entries, size)
            return feedback_pb2.ListFeedbackResponse(feedback=page, next_page_token=more)

        return await self._store.read(read)

    async def _once(
        self, rpc: str, request: Any, context: Any, submit: Callable[[FeedbackStore, str], records.Feedback]
    ) -> feedback_pb2.Feedback:
        """Submits, or returns what the same request_id was answered first."""
        user = current_user()
        body = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()

        def work(store: FeedbackStore) -> tuple[bytes, records.Feedback | None]:
            with store.transaction():
                if request.request_id:
                    first = store.find_request(user, rpc, request.request_id, body)
                    if first is not None:
                        return first, None
                vote = submit(store, user)
                result = convert.feedback(vote).SerializeToString()
                if request.request_id:
                    about = vote.response_id or vote.comparison_id
                    store.remember_request(user, rpc, request.request_id, body, result, about)
                return result, vote

        result, vote = await self._store(work)
        if vote:
            VOTES.labels(vote.kind, vote.value if vote.kind in ("thumb", "choice") else "").inc()
        return feedback_pb2.Feedback.FromString(result)
