# Made from async_client.py by `make stubs`: write there, not here.
"""`Client`: one object for everything a person or an operator does with a prefloop server.

    with Client("127.0.0.1:50051", user="ana") as client:
        for event in client.chat("Why is the sky blue?"):
            if isinstance(event, ChatDelta):
                print(event.text, end="", flush=True)

Events, conversations and votes are the API's own messages (`prefloop.v1`), fully typed. Every failure is a
`PrefloopError`. Any number of threads may use one client; their calls share its connection.
"""

# gRPC's classes are generic in their stubs only, so annotations must not be evaluated.
from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self, TypeVar

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
from prefloop.v1.account_pb2 import ExportUserResponse, ForgetUserResponse, GetCallerResponse
from prefloop.v1.chat_pb2 import Conversation, SamplingOptions, Turn
from prefloop.v1.feedback_pb2 import Choice, Feedback, Message, Thumb
from prefloop.v1.policy_pb2 import GetActivePolicyResponse, Learner, Policy, Round, RoundSample, VoteCount

from clients.calls import (
    ChatEvent,
    CompareEvent,
    Event,
    Metadata,
    Stream,
    StreamingCall,
    chat_event,
    compare_event,
    reply,
)
from clients.channel import Tls, open_channel
from clients.errors import (
    BusyError,
    NotFoundError,
    NotStartedError,
    PrefloopError,
    TimedOutError,
    UnavailableError,
    UntrustedError,
)
from clients.retries import PATIENCE_SECONDS, Backoff, OnWait, Pauses, log_wait

# grpc.health.v1's request for the overall service and its answer SERVING, as they are on the wire: two bytes spare
# every installation of the client a package.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_REQUEST, HEALTH_SERVING = b"", b"\x08\x01"
POLL_SECONDS = 0.2
# Longer and longer, so that waiting for an answer does not use the server's calls a minute up.
LONGEST_POLL_SECONDS = 2.0

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class Page(Protocol):
    """What every List response has."""

    @property
    def next_page_token(self) -> str: ...


PageT = TypeVar("PageT", bound=Page)


class Client:
    """A connection to one prefloop server.

    `address` is "host:port". `api_key` says who calls; on a loopback server without keys, `user` does. Beyond loopback
    the connection is encrypted, by `tls` where it is given. `timeout` (seconds) bounds each attempt at a plain call,
    `stream_timeout` (seconds) at a streamed answer.

    `patience` (seconds) is how long a call is sent again that finds no server, from its first failure on; 0 sends each
    once. Streams that have brought an event, and calls that would do something twice, are never sent again. `on_wait`
    hears of a call's first failure, with the patience; by default that is a warning in the log.
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
        patience: float = PATIENCE_SECONDS,
        on_wait: OnWait = log_wait,
    ) -> None:
        self.address = address
        self.timeout = timeout
        self.stream_timeout = stream_timeout
        self.patience = patience
        self.on_wait = on_wait
        self._metadata = _credentials(api_key, user)
        self._owner = True
        self._pauses = Pauses()
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
        """Closes the connection; streams still open are cancelled, and nothing is sent again.

        >>> client.close()
        """
        if self._owner:
            self._pauses.close()
            self._channel.close()

    def acting_as(self, api_key: str | None = None, user: str | None = None) -> Self:
        """Another person over the same connection. Closing this one leaves the connection open.

        >>> ben = client.acting_as(user="ben")
        >>> (ben.caller()).user, (client.caller()).user
        ('ben', 'ana')
        """
        other = copy.copy(self)
        other._metadata = _credentials(api_key, user)
        other._owner = False
        return other

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
        before brings the first answer again; without one a fresh one is made, so that a message that has to be sent
        again is answered once.

        >>> stream = client.chat("Where do owls live?", temperature=0)
        >>> for event in stream:
        ...     if isinstance(event, ChatDelta):
        ...         print(event.text, end="")
        Owls live in trees.
        >>> stream.conversation_id, stream.response_id
        ('conv', 'resp')
        """
        request = chat_pb2.ChatRequest(
            conversation_id=conversation_id,
            message=message,
            sampling=SamplingOptions(temperature=temperature, max_tokens=max_tokens, seed=seed),
            request_id=request_id or _fresh_id(),
        )
        return self._stream(self._chat.Chat, request, chat_event)

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

        >>> with client.compare("How do I catch a fish?") as stream:
        ...     for event in stream:
        ...         if isinstance(event, CompareFinished):
        ...             print(Slot.Name(event.slot), event.text)
        SLOT_A You may try a net.
        SLOT_B A net helps.
        >>> (client.choose(stream.comparison_id, CHOICE_B)).choice == CHOICE_B
        True
        """
        request = chat_pb2.CompareRequest(
            conversation_id=conversation_id,
            message=message,
            sampling=SamplingOptions(max_tokens=max_tokens, seed=seed),
            request_id=request_id or _fresh_id(),
        )
        return self._stream(self._chat.Compare, request, compare_event)

    def refetch(self, stream: Stream[ChatEvent] | Stream[CompareEvent], timeout: float = 60.0) -> Turn:
        """What the server kept of an answer, for one whose stream broke. Waits until the answer has ended, and for the
        server to come back, `timeout` seconds at most; raises the last PrefloopError then.

        Raises NotStartedError where the stream broke before its Started event.

        >>> stream = client.chat("Where do owls live?")
        >>> for event in stream:
        ...     break
        >>> turn = client.refetch(stream)
        >>> turn.response.text
        'Owls live in trees.'
        """
        answer_id = stream.response_id or stream.comparison_id
        if not answer_id:
            raise NotStartedError(
                "The answer had not started, so nothing of it was kept; ask again.",
                code=grpc.StatusCode.FAILED_PRECONDITION,
            )
        end, pause = time.monotonic() + timeout, POLL_SECONDS
        missing: PrefloopError
        while True:
            try:
                # A second at least: a first look is worth it, however short the wait.
                left = max(1.0, min(self.timeout, end - time.monotonic()))
                found = self._whole(stream.conversation_id, left, patience=0.0)
            except (BusyError, TimedOutError, UnavailableError) as error:
                missing = error
            else:
                turn = _turn(found, answer_id)
                if _ended(turn):
                    return turn
                missing = TimedOutError(
                    f"The answer had not ended after {timeout:g} s.", code=grpc.StatusCode.DEADLINE_EXCEEDED
                )
            if time.monotonic() + pause > end:
                raise missing
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)

    # Votes. Each returns once the vote is on the server's disk. Each has a `request_id` of its own unless one is given,
    # so that it counts once however often it had to be sent; one used before brings the first answer again.

    def thumb(self, response_id: str, thumb: Thumb.ValueType, *, comment: str = "", request_id: str = "") -> Feedback:
        """Sets the user's thumb on an answer; a later one replaces it.

        >>> (client.thumb("resp", THUMB_UP, comment="nice")).feedback_id
        'fb'
        """
        request = feedback_pb2.SubmitThumbRequest(
            response_id=response_id, thumb=thumb, comment=comment, request_id=request_id or _fresh_id()
        )
        return (self._call(self._feedback.SubmitThumb, request)).feedback

    def choose(
        self, comparison_id: str, choice: Choice.ValueType, *, comment: str = "", request_id: str = ""
    ) -> Feedback:
        """Sets the user's choice between two finished answers; the first one decides how the conversation goes on.

        >>> (client.choose("cmp", CHOICE_TIE)).feedback_id
        'fb'
        """
        request = feedback_pb2.SubmitChoiceRequest(
            comparison_id=comparison_id, choice=choice, comment=comment, request_id=request_id or _fresh_id()
        )
        return (self._call(self._feedback.SubmitChoice, request)).feedback

    def correct(self, response_id: str, text: str, *, request_id: str = "") -> Feedback:
        """Says what the answer should have been.

        >>> (client.correct("resp", "Owls nest in hollow trees.")).correction
        'Owls nest in hollow trees.'
        """
        request = feedback_pb2.SubmitCorrectionRequest(
            response_id=response_id, text=text, request_id=request_id or _fresh_id()
        )
        return (self._call(self._feedback.SubmitCorrection, request)).feedback

    def demonstrate(self, messages: list[Message], *, request_id: str = "") -> Feedback:
        """Gives a whole exemplary conversation; the last message is the assistant's.

        >>> question = Message(role=ROLE_USER, content="What do owls eat?")
        >>> answer = Message(role=ROLE_ASSISTANT, content="Mice.")
        >>> (client.demonstrate([question, answer])).demonstration.messages[-1].content
        'Mice.'
        """
        request = feedback_pb2.SubmitDemonstrationRequest(messages=messages, request_id=request_id or _fresh_id())
        return (self._call(self._feedback.SubmitDemonstration, request)).feedback

    def retract(self, feedback_id: str) -> None:
        """Takes one's own feedback back.

        >>> client.retract("fb")
        """
        self._call_once(self._feedback.RetractFeedback, feedback_pb2.RetractFeedbackRequest(feedback_id=feedback_id))

    def feedback(self) -> Iterator[Feedback]:
        """The user's current feedback, newest first; fetched page by page as it is read.

        >>> [vote.feedback_id for vote in client.feedback()]
        ['late', 'early']
        """
        for page in self._pages(
            self._feedback.ListFeedback, lambda token: feedback_pb2.ListFeedbackRequest(page_token=token)
        ):
            yield from page.feedback

    # History

    def conversation(self, conversation_id: str) -> Conversation:
        """One conversation with its turns, votes and version spans.

        >>> (client.conversation("conv")).conversation_id
        'conv'
        """
        return self._whole(conversation_id, self.timeout, self.patience)

    def conversations(self) -> Iterator[Conversation]:
        """The user's conversations without their turns, newest first; fetched page by page as it is read.

        >>> [conversation.title for conversation in client.conversations()]
        ['newer', 'older']
        """
        for page in self._pages(
            self._chat.ListConversations, lambda token: chat_pb2.ListConversationsRequest(page_token=token)
        ):
            yield from page.conversations

    def delete_conversation(self, conversation_id: str) -> None:
        """Removes a conversation from the user's history.

        >>> client.delete_conversation("conv")
        """
        request = chat_pb2.DeleteConversationRequest(conversation_id=conversation_id)
        self._call_once(self._chat.DeleteConversation, request)

    # What is kept of a person

    def caller(self) -> GetCallerResponse:
        """Who the credentials stand for, and in which role.

        >>> caller = client.caller()
        >>> caller.user, caller.role
        ('ana', 'operator')
        """
        return self._call(self._account.GetCaller, account_pb2.GetCallerRequest())

    def export_user(self, user: str = "") -> Stream[ExportUserResponse]:
        """Streams everything that is kept of the caller; of another `user`, for operators.

        >>> [part.WhichOneof("event") for part in client.export_user()]
        ['conversation', 'key']
        """
        return self._stream(self._account.ExportUser, account_pb2.ExportUserRequest(user=user), lambda part: part)

    def forget_user(self, user: str = "") -> ForgetUserResponse:
        """Removes everything that is kept of the caller for good, keys included; of another `user`, for operators. The
        response names the versions that learned from them.

        >>> (client.forget_user("ben")).policy_versions
        ['v0001']
        """
        request = account_pb2.ForgetUserRequest(user=user)
        return self._call_once(self._account.ForgetUser, request, self.stream_timeout)

    # Policies and rounds, for operators

    def active_policy(self) -> GetActivePolicyResponse:
        """The policy that should serve (`policy`), what each server has loaded (`replicas`), what `rollback` would
        activate (`rollback_version`), and how the votes stand where two versions are compared (`duel`).

        >>> (client.active_policy()).policy.version
        'v0001'
        """
        return self._call(self._policy.GetActivePolicy, policy_pb2.GetActivePolicyRequest())

    def policies(self) -> Iterator[Policy]:
        """Every published version, newest first.

        >>> [policy.version for policy in client.policies()]
        ['v0001', 'v0000']
        """
        for page in self._pages(
            self._policy.ListPolicies, lambda token: policy_pb2.ListPoliciesRequest(page_token=token)
        ):
            yield from page.policies

    def activate(self, version: str, *, expected_active_version: str | None = None, reason: str = "") -> Policy:
        """Makes `version` the active one; returns when the server serves it. `reason` is kept with the move.

        Raises ConflictError where `expected_active_version` is given and another version is active.

        >>> (client.activate("v0002", expected_active_version="v0001", reason="It reads better.")).version
        'v0002'
        """
        request = policy_pb2.ActivatePolicyRequest(
            version=version, expected_active_version=expected_active_version, reason=reason
        )
        return (self._call_once(self._policy.ActivatePolicy, request)).policy

    def rollback(self, version: str = "", *, expected_active_version: str | None = None, reason: str = "") -> Policy:
        """Activates a version that was active before, by default the last one that was. The rest is as in `activate`.

        >>> (client.rollback(reason="It rambles.")).version
        'v0000'
        """
        request = policy_pb2.RollbackPolicyRequest(
            version=version, expected_active_version=expected_active_version, reason=reason
        )
        return (self._call_once(self._policy.RollbackPolicy, request)).policy

    def rounds(self) -> Iterator[Round]:
        """The learner's rounds, newest first.

        >>> [each.round_id for each in client.rounds()]
        ['round_2', 'round_1']
        """
        for page in self._pages(self._policy.ListRounds, lambda token: policy_pb2.ListRoundsRequest(page_token=token)):
            yield from page.rounds

    def round_samples(self, round_id: str) -> Iterator[RoundSample]:
        """What held-out prompts were answered before a round and after it.

        >>> [(sample.before, sample.after) for sample in client.round_samples("round_2")]
        [('In trees.', 'Owls live in hollow trees.')]
        """
        for page in self._pages(
            self._policy.ListRoundSamples,
            lambda token: policy_pb2.ListRoundSamplesRequest(round_id=round_id, page_token=token),
        ):
            yield from page.samples

    def count_votes(self, days: int = 30) -> list[VoteCount]:
        """How many votes were cast on each of the last `days` days (UTC), by kind, oldest first.

        >>> [(count.date, count.votes) for count in client.count_votes(days=7)]
        [('2026-03-14', 5)]
        """
        return list((self._call(self._policy.CountVotes, policy_pb2.CountVotesRequest(days=days))).counts)

    def learner(self) -> Learner:
        """Whether a learner listens for requests, what it does, and what became of the last request.

        >>> learner = client.learner()
        >>> learner.listening, learner.new_votes
        (True, 5)
        """
        return (self._call(self._policy.GetLearner, policy_pb2.GetLearnerRequest())).learner

    def request_round(self) -> Learner:
        """Asks the learner that listens for a round now, and returns before it starts.

        Raises ConflictError, its `reason` NO_LEARNER where none listens, ROUND_RUNNING where one is at work.

        >>> (client.request_round()).HasField("request_time")
        True
        """
        return (self._call_once(self._policy.RequestRound, policy_pb2.RequestRoundRequest())).learner

    # Health

    def check(self, timeout: float = 5.0) -> None:
        """Raises UnavailableError unless a server answers within `timeout` seconds and is ready to chat.

        >>> client.check()
        """
        health: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(HEALTH_METHOD)
        answer = self._call_once(health, HEALTH_REQUEST, timeout)
        if answer != HEALTH_SERVING:
            raise UnavailableError(
                f"The server at {self.address} is starting or stopping; try again in a moment.",
                code=grpc.StatusCode.UNAVAILABLE,
            )

    def wait_until_serving(self, timeout: float) -> None:
        """Returns once the server is ready to chat; raises the last PrefloopError after `timeout` seconds, or
        UntrustedError at once.

        >>> client.wait_until_serving(timeout=60)
        """
        end = time.monotonic() + timeout
        while True:
            try:
                return self.check()
            except UntrustedError:
                raise
            except PrefloopError:
                if time.monotonic() > end:
                    raise
            time.sleep(POLL_SECONDS)

    def _whole(self, conversation_id: str, timeout: float, patience: float) -> Conversation:
        """A conversation with all its turns, fetched page by page."""
        whole, token = Conversation(), ""
        while True:
            request = chat_pb2.GetConversationRequest(conversation_id=conversation_id, page_token=token)
            page = self._attempt(self._chat.GetConversation, request, timeout, patience)
            whole.MergeFrom(page.conversation)
            token = page.next_page_token
            if not token:
                return whole

    def _call(self, method: grpc.UnaryUnaryMultiCallable[Request, Reply], request: Request) -> Reply:
        """A call that may be sent again: it changes nothing, or has a `request_id`."""
        return self._attempt(method, request, self.timeout, self.patience)

    def _call_once(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Reply],
        request: Request,
        timeout: float | None = None,
    ) -> Reply:
        """A call that would do or say something else the second time, or that is part of a longer wait."""
        return self._attempt(method, request, timeout or self.timeout, patience=0.0)

    def _attempt(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Reply],
        request: Request,
        timeout: float,
        patience: float,
    ) -> Reply:
        return reply(
            method,
            request,
            timeout=timeout,
            metadata=self._metadata,
            address=self.address,
            backoff=Backoff(patience, self.on_wait),
            pauses=self._pauses,
        )

    def _stream(
        self,
        method: Callable[..., StreamingCall[Reply]],
        request: Request,
        unwrap: Callable[[Reply], Event | None],
    ) -> Stream[Event]:
        return Stream(
            lambda: method(request, timeout=self.stream_timeout, metadata=self._metadata),
            unwrap,
            address=self.address,
            backoff=Backoff(self.patience, self.on_wait),
            pauses=self._pauses,
        )

    def _pages(
        self, method: grpc.UnaryUnaryMultiCallable[Request, PageT], request_for: Callable[[str], Request]
    ) -> Iterator[PageT]:
        token = ""
        while True:
            page = self._call(method, request_for(token))
            yield page
            token = page.next_page_token
            if not token:
                return


def _credentials(api_key: str | None, user: str | None) -> Metadata:
    # gRPC fails on others in ways of its own, and only in a call.
    if user is not None and not (user and user.isascii() and user.isprintable()):
        raise ValueError("A user name is one or more printable ASCII characters.")
    if api_key:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("An API key has printable ASCII characters only.")
        return (("authorization", f"Bearer {api_key}"),)
    return (("x-user-id", user),) if user else ()


def _fresh_id() -> str:
    return str(uuid.uuid4())


def _turn(conversation: Conversation, answer_id: str) -> Turn:
    for turn in conversation.turns:
        if answer_id in (turn.response.response_id, turn.comparison.comparison_id):
            return turn
    raise NotFoundError("The answer is no longer in its conversation.", code=grpc.StatusCode.NOT_FOUND)


def _ended(turn: Turn) -> bool:
    if turn.HasField("response"):
        return bool(turn.response.finish_reason)
    return bool(turn.comparison.a.finish_reason and turn.comparison.b.finish_reason)
