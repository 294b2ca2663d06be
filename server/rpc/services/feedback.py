"""FeedbackService: a vote is acknowledged once it is on disk, and a repeated request counts as one vote."""

import time
from collections.abc import Callable
from typing import Any

from prefloop.v1 import feedback_pb2, feedback_pb2_grpc

from server.engine.base import ModelText
from server.rpc import to_proto
from server.rpc.idempotency import body_sha256
from server.rpc.identity import current_user
from server.rpc.paging import CHUNK, fill, in_chunks
from server.shared.errors import InvalidArgumentError, ServiceError
from server.shared.model.text import UnknownTokenError
from server.store.chats import records
from server.store.quotas import check_demonstrations
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.telemetry.metrics import VOTES
from server.turns.encoding_thread import CHARS_A_TOKEN, encoding


class FeedbackService(feedback_pb2_grpc.FeedbackServiceServicer):
    """Thumbs, choices, corrections and demonstrations of the calling user."""

    def __init__(self, store: StoreThread, text: ModelText, user_demonstrations: int) -> None:
        self._store = store
        self._text = text
        self._user_demonstrations = user_demonstrations

    async def SubmitThumb(
        self, request: feedback_pb2.SubmitThumbRequest, context: Any
    ) -> feedback_pb2.SubmitThumbResponse:
        up = request.thumb == feedback_pb2.THUMB_UP
        feedback = await self._once(
            "SubmitThumb",
            request,
            context,
            lambda store, user: store.feedback.submit_thumb(user, request.response_id, up=up, comment=request.comment),
        )
        return feedback_pb2.SubmitThumbResponse(feedback=feedback)

    async def SubmitChoice(
        self, request: feedback_pb2.SubmitChoiceRequest, context: Any
    ) -> feedback_pb2.SubmitChoiceResponse:
        choice = to_proto.CHOICE_OF[request.choice]
        feedback = await self._once(
            "SubmitChoice",
            request,
            context,
            lambda store, user: store.feedback.submit_choice(user, request.comparison_id, choice, request.comment),
        )
        return feedback_pb2.SubmitChoiceResponse(feedback=feedback)

    async def SubmitPairChoice(
        self, request: feedback_pb2.SubmitPairChoiceRequest, context: Any
    ) -> feedback_pb2.SubmitPairChoiceResponse:
        choice = to_proto.CHOICE_OF[request.choice]
        a, b = request.response_id_a, request.response_id_b
        feedback = await self._once(
            "SubmitPairChoice",
            request,
            context,
            lambda store, user: store.feedback.submit_pair_choice(user, a, b, choice, request.comment),
        )
        return feedback_pb2.SubmitPairChoiceResponse(feedback=feedback)

    async def SubmitCorrection(
        self, request: feedback_pb2.SubmitCorrectionRequest, context: Any
    ) -> feedback_pb2.SubmitCorrectionResponse:
        user = current_user()
        prompt = await self._store.read(
            lambda store: len(store.responses.get(user, request.response_id).prompt_token_ids)
        )
        self._check_chars("text", len(request.text))
        try:
            tokens = len(await encoding(self._text.encode_answer, request.text))
        except UnknownTokenError as error:
            raise InvalidArgumentError("text", f"text has {error}") from error
        self._check_fits("text", tokens, self._text.max_model_len - prompt)
        feedback = await self._once(
            "SubmitCorrection",
            request,
            context,
            lambda store, user: store.feedback.submit_correction(user, request.response_id, request.text),
        )
        return feedback_pb2.SubmitCorrectionResponse(feedback=feedback)

    async def SubmitDemonstration(
        self, request: feedback_pb2.SubmitDemonstrationRequest, context: Any
    ) -> feedback_pb2.SubmitDemonstrationResponse:
        messages = [{"role": to_proto.ROLES[part.role], "content": part.content} for part in request.messages]
        self._check_chars("messages", sum(len(message["content"]) for message in messages))
        try:
            tokens = await encoding(self._count, messages)
        except UnknownTokenError as error:
            raise InvalidArgumentError("messages", f"messages have {error}") from error
        except ValueError as error:
            sentence = "messages are in an order that the model's chat template does not accept."
            raise InvalidArgumentError("messages", sentence) from error
        self._check_fits("messages", tokens, self._text.max_model_len)

        def submit(store: Store, user: str) -> records.Feedback:
            check_demonstrations(store, user, self._user_demonstrations)
            return store.feedback.submit_demonstration(user, messages)

        feedback = await self._once("SubmitDemonstration", request, context, submit)
        return feedback_pb2.SubmitDemonstrationResponse(feedback=feedback)

    async def RetractFeedback(
        self, request: feedback_pb2.RetractFeedbackRequest, context: Any
    ) -> feedback_pb2.RetractFeedbackResponse:
        user = current_user()
        await self._store(lambda store: store.feedback.retract(user, request.feedback_id), user)
        return feedback_pb2.RetractFeedbackResponse()

    async def ListFeedback(
        self, request: feedback_pb2.ListFeedbackRequest, context: Any
    ) -> feedback_pb2.ListFeedbackResponse:
        user = current_user()
        size = request.page_size or to_proto.DEFAULT_PAGE_SIZE
        key = to_proto.page_key(request.page_token, (int,))

        def read(store: Store) -> feedback_pb2.ListFeedbackResponse:
            def follow(last: records.Feedback | None) -> list[records.Feedback]:
                before = last.event_seq if last else key[0] if key else None
                return store.feedback.page(user, CHUNK, before)

            entries = (([vote.event_seq], to_proto.feedback(vote)) for vote in in_chunks(follow))
            page, more = fill(entries, size)
            return feedback_pb2.ListFeedbackResponse(feedback=page, next_page_token=more)

        return await self._store.read(read)

    def _count(self, messages: list[dict[str, str]]) -> int:
        """The tokens of a conversation that ends with an answer."""
        prompt = self._text.encode(messages[:-1], time.time())
        return len(prompt) + len(self._text.encode_answer(messages[-1]["content"]))

    def _check_chars(self, field: str, chars: int) -> None:
        """Refuse a text that cannot fit before it is encoded."""
        most = self._text.max_model_len
        if chars > CHARS_A_TOKEN * most:
            raise InvalidArgumentError(field, f"{field} must have at most {most} tokens, but has {chars} characters.")

    def _check_fits(self, field: str, tokens: int, most: int) -> None:
        """Refuse a text that the model cannot read as a whole."""
        if tokens > most:
            raise InvalidArgumentError(field, f"{field} must have at most {most} tokens here, not {tokens}.")

    async def _once(
        self, rpc: str, request: Any, context: Any, submit: Callable[[Store, str], records.Feedback]
    ) -> feedback_pb2.Feedback:
        """Submit, or return the stored result of the first call with this request_id."""
        user = current_user()
        body = body_sha256(request)

        def new(store: Store) -> tuple[bytes, records.Feedback]:
            with store.transaction():
                vote = submit(store, user)
                result = to_proto.feedback(vote).SerializeToString()
                about = vote.response_id or vote.comparison_id
                store.requests.remember(user, rpc, request.request_id, body, result, about)
                return result, vote

        def work(store: Store) -> tuple[bytes, records.Feedback | None]:
            try:
                return new(store)
            except ServiceError:
                # Most requests are new: only one that is refused is looked up.
                first = store.requests.find(user, rpc, request.request_id, body)
                if first is None:
                    raise
                return first, None

        result, vote = await self._store(work, user)
        if vote:
            VOTES.labels(vote.kind, vote.value if vote.kind in ("thumb", "choice") else "").inc()
        return feedback_pb2.Feedback.FromString(result)
