"""A small server for the client under test: real gRPC on port 0 with scripted answers."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prefloop.v1 import (
    account_pb2,
    account_pb2_grpc,
    chat_pb2,
    chat_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    review_pb2,
    review_pb2_grpc,
)
from prefloop.v1.chat_pb2 import FINISH_REASON_STOP, SLOT_A, SLOT_B, Usage
from prefloop.v1.feedback_pb2 import FEEDBACK_KIND_DEMONSTRATION, FEEDBACK_KIND_THUMB

from clients import Client

WAIT_SECONDS = 10
# Longer, so that tests can distinguish a call that was ended from one that was not.
HOLD_SECONDS = 2 * WAIT_SECONDS
ANSWER = ["Owls ", "live in ", "trees."]
# The same answer in the conversation's history.
ANSWERED = chat_pb2.Turn(
    message="Where do owls live?",
    response=chat_pb2.Response(response_id="resp", text="".join(ANSWER), finish_reason=FINISH_REASON_STOP),
)


class FakeService(
    account_pb2_grpc.AccountServiceServicer,
    chat_pb2_grpc.ChatServiceServicer,
    feedback_pb2_grpc.FeedbackServiceServicer,
    policy_pb2_grpc.PolicyServiceServicer,
    review_pb2_grpc.ReviewServiceServicer,
):
    """Records its requests. `fail` holds errors for the next calls of an RPC. While `hold` is clear, streams pause
    midway and GetConversation and SubmitThumb wait; `breaking` ends streams midway with an error."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.peers: list[str] = []
        self.fail: dict[str, list[Status | grpc.StatusCode]] = {}
        self.hold = threading.Event()
        self.hold.set()
        # The engine dies after the first word.
        self.breaking = False
        self.cancelled = threading.Event()
        self.conversation = chat_pb2.Conversation(conversation_id="conv")
        self.replicas: list[policy_pb2.Replica] = []
        self.reviews = [
            review_pb2.Review(
                messages=[feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content="Where do owls live?")],
                comparison=chat_pb2.Comparison(
                    comparison_id="cmp",
                    a=chat_pb2.Response(response_id="respA", text="In trees."),
                    b=chat_pb2.Response(response_id="respB", text="In hollow trees."),
                ),
            )
        ]
        # Released once for every chat, conversation and thumb that has begun.
        self.begun = threading.Semaphore(0)

    def _enter(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.append(context.peer())
        failures = self.fail.get(type(request).__name__.removesuffix("Request"), [])
        if failures:
            status = failures.pop(0)
            if isinstance(status, grpc.StatusCode):
                # As gRPC itself ends a call, without a status of ours.
                context.abort(status, status.name)
            context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
            code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
            context.abort(code, status.message)

    def _wait(self, context: Any) -> None:
        context.add_callback(self.cancelled.set)
        self.begun.release()
        self.hold.wait(HOLD_SECONDS)

    def Chat(self, request: Any, context: Any) -> Iterator[chat_pb2.ChatResponse]:
        self.begun.release()
        self._enter(request, context)
        context.add_callback(self.cancelled.set)
        yield chat_pb2.ChatResponse(
            started=chat_pb2.ChatStarted(conversation_id="conv", response_id="resp", policy_version="v0000")
        )
        # An event of a kind that this client does not know.
        yield chat_pb2.ChatResponse()
        for piece in ANSWER:
            yield chat_pb2.ChatResponse(delta=chat_pb2.ChatDelta(text=piece))
            if self.breaking:
                context.abort(grpc.StatusCode.UNAVAILABLE, "The engine died.")
            if not self.hold.wait(HOLD_SECONDS):
                return
        yield chat_pb2.ChatResponse(
            finished=chat_pb2.ChatFinished(
                text="".join(ANSWER),
                finish_reason=FINISH_REASON_STOP,
                usage=Usage(prompt_tokens=5, completion_tokens=6),
                policy_version="v0001",
            )
        )

    def Compare(self, request: Any, context: Any) -> Iterator[chat_pb2.CompareResponse]:
        self._enter(request, context)
        answers = {SLOT_A: "You may try a net.", SLOT_B: "A net helps."}
        yield chat_pb2.CompareResponse(
            started=chat_pb2.CompareStarted(conversation_id="conv", comparison_id=f"cmp {request.message}")
        )
        for slot, text in answers.items():
            yield chat_pb2.CompareResponse(delta=chat_pb2.CompareDelta(slot=slot, text=text))
        if self.breaking:
            context.abort(grpc.StatusCode.UNAVAILABLE, "The engine died.")
        for slot, text in answers.items():
            yield chat_pb2.CompareResponse(
                finished=chat_pb2.CompareFinished(
                    slot=slot,
                    text=text,
                    finish_reason=FINISH_REASON_STOP,
                    usage=Usage(completion_tokens=6),
                    response_id=f"resp{slot}",
                )
            )

    def FindResponse(self, request: Any, context: Any) -> chat_pb2.FindResponseResponse:
        self._enter(request, context)
        return chat_pb2.FindResponseResponse(response_id="resp")

    def ListVersions(self, request: Any, context: Any) -> chat_pb2.ListVersionsResponse:
        self._enter(request, context)
        versions = [chat_pb2.LiveVersion(policy_version=version) for version in ("v0001", "v0000")]
        return chat_pb2.ListVersionsResponse(versions=versions)

    def GetConversation(self, request: Any, context: Any) -> chat_pb2.GetConversationResponse:
        self._enter(request, context)
        self._wait(context)
        return chat_pb2.GetConversationResponse(conversation=self.conversation)

    def ListConversations(self, request: Any, context: Any) -> chat_pb2.ListConversationsResponse:
        self._enter(request, context)
        first = not request.page_token
        name = "newer" if first else "older"
        return chat_pb2.ListConversationsResponse(
            conversations=[chat_pb2.Conversation(conversation_id=name, title=name)],
            next_page_token="page 2" if first else "",
        )

    def SubmitThumb(self, request: Any, context: Any) -> feedback_pb2.SubmitThumbResponse:
        self._enter(request, context)
        self._wait(context)
        return feedback_pb2.SubmitThumbResponse(feedback=feedback_pb2.Feedback(feedback_id="fb", thumb=request.thumb))

    def SubmitChoice(self, request: Any, context: Any) -> feedback_pb2.SubmitChoiceResponse:
        self._enter(request, context)
        return feedback_pb2.SubmitChoiceResponse(
            feedback=feedback_pb2.Feedback(feedback_id="fb", choice=request.choice)
        )

    def SubmitPairChoice(self, request: Any, context: Any) -> feedback_pb2.SubmitPairChoiceResponse:
        self._enter(request, context)
        return feedback_pb2.SubmitPairChoiceResponse(
            feedback=feedback_pb2.Feedback(feedback_id="fb", choice=request.choice)
        )

    def GetReview(self, request: Any, context: Any) -> review_pb2.GetReviewResponse:
        self._enter(request, context)
        if not self.reviews:
            return review_pb2.GetReviewResponse()
        return review_pb2.GetReviewResponse(review=self.reviews[0], waiting=len(self.reviews))

    def SkipReview(self, request: Any, context: Any) -> review_pb2.SkipReviewResponse:
        self._enter(request, context)
        del self.reviews[0]
        return review_pb2.SkipReviewResponse()

    def RetractFeedback(self, request: Any, context: Any) -> feedback_pb2.RetractFeedbackResponse:
        self._enter(request, context)
        return feedback_pb2.RetractFeedbackResponse()

    def GetActivePolicy(self, request: Any, context: Any) -> policy_pb2.GetActivePolicyResponse:
        self._enter(request, context)
        return policy_pb2.GetActivePolicyResponse(policy=policy_pb2.Policy(version="v0001"), replicas=self.replicas)

    def ActivatePolicy(self, request: Any, context: Any) -> policy_pb2.ActivatePolicyResponse:
        self._enter(request, context)
        return policy_pb2.ActivatePolicyResponse(policy=policy_pb2.Policy(version=request.version))

    def ForgetUser(self, request: Any, context: Any) -> account_pb2.ForgetUserResponse:
        self._enter(request, context)
        return account_pb2.ForgetUserResponse(votes=3, policy_versions=["v0001"])

    def ExportUser(self, request: Any, context: Any) -> Iterator[account_pb2.ExportUserResponse]:
        self._enter(request, context)
        yield account_pb2.ExportUserResponse(conversation=self.conversation)
        yield account_pb2.ExportUserResponse(key=account_pb2.Key(key_id="key_1"))

    def GetCaller(self, request: Any, context: Any) -> account_pb2.GetCallerResponse:
        self._enter(request, context)
        return account_pb2.GetCallerResponse(user=self.metadata[-1].get("x-user-id", ""), role="operator")

    def DeleteConversation(self, request: Any, context: Any) -> chat_pb2.DeleteConversationResponse:
        self._enter(request, context)
        return chat_pb2.DeleteConversationResponse()

    def SubmitCorrection(self, request: Any, context: Any) -> feedback_pb2.SubmitCorrectionResponse:
        self._enter(request, context)
        return feedback_pb2.SubmitCorrectionResponse(
            feedback=feedback_pb2.Feedback(feedback_id="fb", correction=request.text)
        )

    def SubmitDemonstration(self, request: Any, context: Any) -> feedback_pb2.SubmitDemonstrationResponse:
        self._enter(request, context)
        given = feedback_pb2.Demonstration(messages=request.messages)
        return feedback_pb2.SubmitDemonstrationResponse(
            feedback=feedback_pb2.Feedback(feedback_id="fb", kind=FEEDBACK_KIND_DEMONSTRATION, demonstration=given)
        )

    def ListFeedback(self, request: Any, context: Any) -> feedback_pb2.ListFeedbackResponse:
        self._enter(request, context)
        first = not request.page_token
        return feedback_pb2.ListFeedbackResponse(
            feedback=[feedback_pb2.Feedback(feedback_id="late" if first else "early")],
            next_page_token="page 2" if first else "",
        )

    def ListPolicies(self, request: Any, context: Any) -> policy_pb2.ListPoliciesResponse:
        self._enter(request, context)
        return policy_pb2.ListPoliciesResponse(
            policies=[policy_pb2.Policy(version=version) for version in ("v0001", "v0000")]
        )

    def RollbackPolicy(self, request: Any, context: Any) -> policy_pb2.RollbackPolicyResponse:
        self._enter(request, context)
        return policy_pb2.RollbackPolicyResponse(policy=policy_pb2.Policy(version=request.version or "v0000"))

    def ListRounds(self, request: Any, context: Any) -> policy_pb2.ListRoundsResponse:
        self._enter(request, context)
        return policy_pb2.ListRoundsResponse(
            rounds=[policy_pb2.Round(round_id=round_id) for round_id in ("round_2", "round_1")]
        )

    def ListRoundSamples(self, request: Any, context: Any) -> policy_pb2.ListRoundSamplesResponse:
        self._enter(request, context)
        sample = policy_pb2.RoundSample(prompt="Owls?", before="In trees.", after="Owls live in hollow trees.")
        return policy_pb2.ListRoundSamplesResponse(samples=[sample])

    def CountVotes(self, request: Any, context: Any) -> policy_pb2.CountVotesResponse:
        self._enter(request, context)
        counts = [policy_pb2.VoteCount(date="2026-03-14", kind=FEEDBACK_KIND_THUMB, votes=5)]
        return policy_pb2.CountVotesResponse(counts=counts)

    def GetLearner(self, request: Any, context: Any) -> policy_pb2.GetLearnerResponse:
        self._enter(request, context)
        return policy_pb2.GetLearnerResponse(learner=policy_pb2.Learner(listening=True, new_votes=5))

    def RequestRound(self, request: Any, context: Any) -> policy_pb2.RequestRoundResponse:
        self._enter(request, context)
        asked = Timestamp(seconds=1)
        return policy_pb2.RequestRoundResponse(learner=policy_pb2.Learner(listening=True, request_time=asked))

    def sent(self, kind: str) -> list[Any]:
        """The requests of one RPC, in order."""
        return [request for request in self.requests if type(request).__name__ == f"{kind}Request"]


def status(code: grpc.StatusCode, message: str, *, reason: str = "", field: str = "") -> Status:
    """A google.rpc.Status with the details that the server sends."""
    details = []
    if reason:
        details.append(AnyMessage())
        details[-1].Pack(ErrorInfo(reason=reason, domain="prefloop"))
    if field:
        details.append(AnyMessage())
        details[-1].Pack(BadRequest(field_violations=[BadRequest.FieldViolation(field=field)]))
    return Status(code=code.value[0], message=message, details=details)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def address(service: FakeService) -> Iterator[str]:
    with serving(service) as port:
        yield f"127.0.0.1:{port}"


@contextmanager
def serving(
    service: FakeService,
    credentials: grpc.ServerCredentials | None = None,
    *,
    port: int = 0,
    options: Sequence[tuple[str, Any]] = (),
) -> Iterator[int]:
    """Runs the service on a port, with or without TLS."""
    server = grpc.server(ThreadPoolExecutor(8), options=list(options))
    account_pb2_grpc.add_AccountServiceServicer_to_server(service, server)
    chat_pb2_grpc.add_ChatServiceServicer_to_server(service, server)
    feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(service, server)
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(service, server)
    review_pb2_grpc.add_ReviewServiceServicer_to_server(service, server)
    healthy = health.HealthServicer()
    healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    where = f"127.0.0.1:{port}"
    port = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
    server.start()
    try:
        yield port
    finally:
        stopped = server.stop(None)
        service.hold.set()
        stopped.wait(WAIT_SECONDS)


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, user="ana", timeout=WAIT_SECONDS, stream_timeout=WAIT_SECONDS) as client:
        yield client
