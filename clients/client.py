"""`Client`: one object for everything a person or an operator does with a prefloop server.

    with Client("127.0.0.1:50051", user="ana") as client:
        for event in client.chat("Why is the sky blue?"):
            if isinstance(event, ChatDelta):
                print(event.text, end="", flush=True)

Events, conversations and votes are the API's own messages (`prefloop.v1`), fully typed. Every failure is a
`PrefloopError`. One client may be used by many threads; calls share its connection.
"""

# gRPC's classes are generic in their stubs only, so annotations must not be evaluated.
from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import grpc
from prefloop.v1 import (
    account_pb2,
    account_pb2_grpc,
    chat_pb2,
    chat_pb2_grpc,
    feedback_pb2,
    feedback_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
)
from prefloop.v1.account_pb2 import ExportUserResponse, ForgetUserResponse
from prefloop.v1.chat_pb2 import (
    ChatDelta,
    ChatFinished,
    ChatStarted,
    CompareDelta,
    CompareFinished,
    CompareStarted,
    Conversation,
    SamplingOptions,
)
from prefloop.v1.feedback_pb2 import Choice, Feedback, Message, Thumb
from prefloop.v1.policy_pb2 import GetActivePolicyResponse, Policy, Round

from clients.channel import Tls, open_channel
from clients.errors import PrefloopError, UnavailableError, from_rpc_error

ChatEvent = ChatStarted | ChatDelta | ChatFinished
CompareEvent = CompareStarted | CompareDelta | CompareFinished

# grpc.health.v1's request for the overall service and its answer SERVING, as they are on the wire: two bytes spare
# every installation of the client a package.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_REQUEST, HEALTH_SERVING = b"", b"\x08\x01"
HEALTH_POLL_SECONDS = 0.2

Event = TypeVar("Event")
Request = TypeVar("Request")
Reply = TypeVar("Reply")


class Page(Protocol):
    """What every List response has."""

    @property
    def next_page_token(self) -> str: ...


PageT = TypeVar("PageT", bound=Page)
ReplyT = TypeVar("ReplyT", covariant=True)


class StreamingCall(Protocol[ReplyT]):
    """The part of a gRPC stream that `Stream` needs."""

    def __iter__(self) -> Iterator[ReplyT]: ...

    def cancel(self) -> bool: ...


class Stream(Iterator[Event], Generic[Event]):
    """The events of one answer, as they come. `cancel` (from any thread) or leaving a `with` block stops the answer on
    the server too; the iterator then simply ends. A call that fails raises a `PrefloopError` from `next`.
    """

    def __init__(self, call: StreamingCall[Reply], unwrap: Callable[[Reply], Event | None], address: str) -> None:
        self._call = call
        self._events = (unwrap(reply) for reply in call)
        self._address = address
        self._heard = False
        self._cancelled = False

    def __next__(self) -> Event:
        try:
            # None: an event kind newer than this client.
            event = next(event for event in self._events if event is not None)
        except grpc.RpcError as error:
            if self._cancelled:
                raise StopIteration from None
            raise from_rpc_error(error, self._address, heard=self._heard) from error
        self._heard = True
        return event

    def cancel(self) -> None:
        """Stops the answer. Does nothing to one that has ended."""
        self._cancelled = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()


class Client:
    """A connection to one prefloop server.

    `address` is "host:port". `api_key` says who calls; on a loopback server without keys, `user` does. Beyond loopback
    the connection is encrypted, by `tls` where it is given. `timeout` (seconds) bounds each plain call,
    `stream_timeout` (seconds) each streamed answer.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        user: str | None = None,
        tls: Tls | None = None,
        timeout: float = 30.0,
        stream_timeout: float = 600.0,
    ) -> None:
        if user is not None and not (user and user.isascii() and user.isprintable()):
            raise ValueError("A user name is one or more printable ASCII characters.")
        self.address = address
        self.timeout = timeout
        self.stream_timeout = stream_timeout
        self._metadata: tuple[tuple[str, str], ...] = (("x-user-id", user),) if user else ()
        if api_key:
            self._metadata = (("authorization", f"Bearer {api_key}"),)
        self._channel = open_channel(address, tls)
        self._chat = chat_pb2_grpc.ChatServiceStub(self._channel)
        self._feedback = feedback_pb2_grpc.FeedbackServiceStub(self._channel)
        self._account = account_pb2_grpc.AccountServiceStub(self._channel)
        self._policy = policy_pb2_grpc.PolicyServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; streams still open are cancelled."""
        self._channel.close()

    # Answers

    def chat(
        self,
        message: str,
        *,
        conversation_id: str = "",
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        request_id: str = "",
    ) -> Stream[ChatEvent]:
        """Streams the answer to one message: `ChatStarted`, any number of `ChatDelta`, `ChatFinished`.

        An empty `conversation_id` starts a conversation. `max_tokens` counts tokens of the answer. A `request_id` used
        before brings the first answer again.
        """
        request = chat_pb2.ChatRequest(
            conversation_id=conversation_id,
            message=message,
            sampling=SamplingOptions(temperature=temperature, max_tokens=max_tokens, seed=seed),
            request_id=request_id,
        )
        call = self._chat.Chat(request, timeout=self.stream_timeout, metadata=self._metadata)
        return Stream(call, _chat_event, self.address)

    def compare(
        self,
        message: str,
        *,
        conversation_id: str = "",
        max_tokens: int | None = None,
        seed: int | None = None,
        request_id: str = "",
    ) -> Stream[CompareEvent]:
        """Streams two answers to one message: `CompareStarted`, `CompareDelta` by slot, one `CompareFinished` a slot.

        Choose between them with `choose`. The arguments are those of `chat`; the two temperatures are the server's.
        """
        request = chat_pb2.CompareRequest(
            conversation_id=conversation_id,
            message=message,
            sampling=SamplingOptions(max_tokens=max_tokens, seed=seed),
            request_id=request_id,
        )
        call = self._chat.Compare(request, timeout=self.stream_timeout, metadata=self._metadata)
        return Stream(call, _compare_event, self.address)

    # Votes. Each returns once the vote is on the server's disk.

    def thumb(self, response_id: str, thumb: Thumb.ValueType, *, comment: str = "") -> Feedback:
        """Sets the user's thumb on an answer; a later one replaces it."""
        request = feedback_pb2.SubmitThumbRequest(
            response_id=response_id, thumb=thumb, comment=comment, request_id=_request_id()
        )
        return self._unary(self._feedback.SubmitThumb, request).feedback

    def choose(self, comparison_id: str, choice: Choice.ValueType, *, comment: str = "") -> Feedback:
        """Sets the user's choice between two finished answers; the first one decides how the conversation goes on."""
        request = feedback_pb2.SubmitChoiceRequest(
            comparison_id=comparison_id, choice=choice, comment=comment, request_id=_request_id()
        )
        return self._unary(self._feedback.SubmitChoice, request).feedback

    def correct(self, response_id: str, text: str) -> Feedback:
        """Says what the answer should have been."""
        request = feedback_pb2.SubmitCorrectionRequest(response_id=response_id, text=text, request_id=_request_id())
        return self._unary(self._feedback.SubmitCorrection, request).feedback

    def demonstrate(self, messages: list[Message]) -> Feedback:
        """Gives a whole exemplary conversation; the last message is the assistant's."""
        request = feedback_pb2.SubmitDemonstrationRequest(messages=messages, request_id=_request_id())
        return self._unary(self._feedback.SubmitDemonstration, request).feedback

    def retract(self, feedback_id: str) -> None:
        """Takes one's own feedback back."""
        self._unary(self._feedback.RetractFeedback, feedback_pb2.RetractFeedbackRequest(feedback_id=feedback_id))

    def feedback(self) -> Iterator[Feedback]:
        """The user's current feedback, newest first; fetched page by page as it is read."""
        for page in self._pages(self._feedback.ListFeedback, lambda t: feedback_pb2.ListFeedbackRequest(page_token=t)):
            yield from page.feedback

    # History

    def conversation(self, conversation_id: str) -> Conversation:
        """One conversation with its turns, votes and version spans."""
        request = chat_pb2.GetConversationRequest(conversation_id=conversation_id)
        return self._unary(self._chat.GetConversation, request).conversation

    def conversations(self) -> Iterator[Conversation]:
        """The user's conversations without their turns, newest first; fetched page by page as it is read."""
        for page in self._pages(
            self._chat.ListConversations, lambda t: chat_pb2.ListConversationsRequest(page_token=t)
        ):
            yield from page.conversations

    def delete_conversation(self, conversation_id: str) -> None:
        """Removes a conversation from the user's history."""
        self._unary(self._chat.DeleteConversation, chat_pb2.DeleteConversationRequest(conversation_id=conversation_id))

    # What is kept of a person

    def export_user(self, user: str = "") -> Stream[ExportUserResponse]:
        """Streams everything that is kept of the caller; of another `user`, for operators."""
        call = self._account.ExportUser(
            account_pb2.ExportUserRequest(user=user), timeout=self.stream_timeout, metadata=self._metadata
        )
        return Stream(call, lambda part: part, self.address)

    def forget_user(self, user: str = "") -> ForgetUserResponse:
        """Removes everything that is kept of the caller for good, keys included; of another `user`, for operators. The
        response names the versions that learned from them."""
        request = account_pb2.ForgetUserRequest(user=user)
        try:
            return self._account.ForgetUser(request, timeout=self.stream_timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    # Policies, for operators

    def active_policy(self) -> GetActivePolicyResponse:
        """The policy that should serve (`policy`), and what each server has loaded (`replicas`)."""
        return self._unary(self._policy.GetActivePolicy, policy_pb2.GetActivePolicyRequest())

    def policies(self) -> Iterator[Policy]:
        """Every published version, newest first."""
        for page in self._pages(self._policy.ListPolicies, lambda t: policy_pb2.ListPoliciesRequest(page_token=t)):
            yield from page.policies

    def rounds(self) -> Iterator[Round]:
        """The learner's rounds, newest first."""
        for page in self._pages(self._policy.ListRounds, lambda t: policy_pb2.ListRoundsRequest(page_token=t)):
            yield from page.rounds

    def activate(self, version: str, *, expected_active_version: str | None = None) -> Policy:
        """Makes `version` the active one; returns when the server serves it.

        Raises ConflictError where `expected_active_version` is given and another version is active.
        """
        request = policy_pb2.ActivatePolicyRequest(version=version, expected_active_version=expected_active_version)
        return self._unary(self._policy.ActivatePolicy, request).policy

    def rollback(self, version: str = "") -> Policy:
        """Activates a version that was active before; by default the last one that was."""
        return self._unary(self._policy.RollbackPolicy, policy_pb2.RollbackPolicyRequest(version=version)).policy

    # Health

    def check(self, timeout: float = 5.0) -> None:
        """Raises UnavailableError unless a server answers within `timeout` seconds and is ready to chat."""
        health: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(HEALTH_METHOD)
        try:
            reply = health(HEALTH_REQUEST, timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error
        if reply != HEALTH_SERVING:
            raise UnavailableError(
                f"The server at {self.address} is starting or stopping; try again in a moment.",
                code=grpc.StatusCode.UNAVAILABLE,
            )

    def wait_until_serving(self, timeout: float) -> None:
        """Returns once the server is ready to chat; raises the last PrefloopError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while True:
            try:
                return self.check()
            except PrefloopError:
                if time.monotonic() > end:
                    raise
            time.sleep(HEALTH_POLL_SECONDS)

    def _unary(self, method: grpc.UnaryUnaryMultiCallable[Request, Reply], request: Request) -> Reply:
        try:
            return method(request, timeout=self.timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    def _pages(
        self, method: grpc.UnaryUnaryMultiCallable[Request, PageT], request_for: Callable[[str], Request]
    ) -> Iterator[PageT]:
        token = ""
        while True:
            page = self._unary(method, request_for(token))
            yield page
            token = page.next_page_token
            if not token:
                return


def _request_id() -> str:
    return str(uuid.uuid4())


def _chat_event(reply: chat_pb2.ChatResponse) -> ChatEvent | None:
    match reply.WhichOneof("event"):
        case "started":
            return reply.started
        case "delta":
            return reply.delta
        case "finished":
            return reply.finished
        case _:
            return None


def _compare_event(reply: chat_pb2.CompareResponse) -> CompareEvent | None:
    match reply.WhichOneof("event"):
        case "started":
            return reply.started
        case "delta":
            return reply.delta
        case "finished":
            return reply.finished
        case _:
            return None
