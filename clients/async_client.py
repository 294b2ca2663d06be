"""`AsyncClient`: one object for everything a user or an operator does with a prefloop server.

    async with AsyncClient("127.0.0.1:50051", user="ana") as client:
        async for event in client.chat("Why is the sky blue?"):
            if isinstance(event, ChatDelta):
                print(event.text, end="", flush=True)

Events, conversations and votes are the API's own messages (`prefloop.v1`), fully typed. Every failure is a
`PrefloopError`. Any number of tasks may use one client; their calls share its connection.
"""

# gRPC's classes are generic in their stubs only, so annotations must not be evaluated.
from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
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
    review_pb2,
    review_pb2_grpc,
)
from prefloop.v1.account_pb2 import ExportUserResponse, ForgetUserResponse, GetCallerResponse
from prefloop.v1.chat_pb2 import Conversation, LiveVersion, SamplingOptions, Turn
from prefloop.v1.feedback_pb2 import Choice, Feedback, Message, Thumb
from prefloop.v1.policy_pb2 import GetActivePolicyResponse, Learner, Policy, Round, RoundSample, VoteCount
from prefloop.v1.review_pb2 import GetReviewResponse

from clients.calls import (
    AsyncStream,
    AsyncStreamingCall,
    ChatEvent,
    CompareEvent,
    Event,
    Metadata,
    async_reply,
    chat_event,
    compare_event,
)
from clients.channel import Tls, open_async_channel
from clients.errors import (
    BusyError,
    NotFoundError,
    NotStartedError,
    PrefloopError,
    TimedOutError,
    UnavailableError,
    UntrustedError,
)
from clients.retries import PATIENCE_SECONDS, AsyncPauses, Backoff, OnWait, log_wait

# grpc.health.v1's request for the overall service and the response SERVING, in wire format. Two bytes here save every
# installation of the client a dependency.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_REQUEST, HEALTH_SERVING = b"", b"\x08\x01"
POLL_SECONDS = 0.2
# The interval grows to this, so that waiting for an answer does not use up the user's calls per minute.
LONGEST_POLL_SECONDS = 2.0

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class Page(Protocol):
    """The field that every List response has."""

    @property
    def next_page_token(self) -> str: ...


PageT = TypeVar("PageT", bound=Page)


class AsyncClient:
    """A connection to one prefloop server.

    `address` is "host:port". `api_key` identifies the caller; on a loopback server without keys, `user` does. The key
    of an application speaks for `end_user`, a name of its own choice. Beyond
    loopback the connection is encrypted, with `tls` if it is given. `timeout` (seconds) limits each attempt at a unary
    call, `stream_timeout` (seconds) each attempt at a streamed answer.

    `patience` (seconds) is how long a call that finds no server is retried, counted from its first failure; 0 means no
    retries. A stream that has delivered an event, or a call that is not idempotent, is never retried. `on_wait` is
    called with a call's first failure and the patience; by default it logs a warning.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        user: str | None = None,
        end_user: str | None = None,
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
        self._metadata = _credentials(api_key, user, end_user)
        self._owner = True
        self._pauses = AsyncPauses()
        self._channel = open_async_channel(address, tls)
        self._chat = chat_pb2_grpc.ChatServiceStub(self._channel)
        self._feedback = feedback_pb2_grpc.FeedbackServiceStub(self._channel)
        self._account = account_pb2_grpc.AccountServiceStub(self._channel)
        self._policy = policy_pb2_grpc.PolicyServiceStub(self._channel)
        self._review = review_pb2_grpc.ReviewServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection, cancels open streams and stops retries.

        >>> await client.close()
        """
        if self._owner:
            self._pauses.close()
            await self._channel.close()

    def acting_as(self, api_key: str | None = None, user: str | None = None, end_user: str | None = None) -> Self:
        """A client for another user over the same connection. Closing it leaves the connection open.

        >>> ben = client.acting_as(user="ben")
        >>> (await ben.caller()).user, (await client.caller()).user
        ('ben', 'ana')
        """
        other = copy.copy(self)
        other._metadata = _credentials(api_key, user, end_user)
        other._owner = False
        return other

    # Answers

    def chat(
        self,
        message: str | Sequence[Message],
        *,
        conversation_id: str = "",
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        system: str | None = None,
        policy_version: str = "",
        request_id: str = "",
    ) -> AsyncStream[ChatEvent]:
        """Streams the answer to one message: `ChatStarted`, any number of `ChatDelta`, `ChatFinished`.

        An empty `conversation_id` starts a conversation, with `system` as its system prompt, or the server's if that is
        None. Instead of a message, the caller's own history may be given, which ends with the new message; the server
        finds the conversation that it continues. `max_tokens` limits the answer, and it ends before the first of `stop`
        that comes. `policy_version` is one of `versions` to answer with. A `request_id` used before returns the first
        answer again. By default a new one is generated, so that a retried message is answered once.

        >>> stream = client.chat("Where do owls live?", temperature=0)
        >>> async for event in stream:
        ...     if isinstance(event, ChatDelta):
        ...         print(event.text, end="")
        Owls live in trees.
        >>> stream.conversation_id, stream.response_id
        ('conv', 'resp')
        """
        request = chat_pb2.ChatRequest(
            conversation_id=conversation_id,
            message=message if isinstance(message, str) else "",
            messages=() if isinstance(message, str) else message,
            sampling=SamplingOptions(temperature=temperature, max_tokens=max_tokens, seed=seed, stop=stop),
            request_id=request_id or _fresh_id(),
            system=system,
            policy_version=policy_version,
        )
        return self._stream(self._chat.Chat, request, chat_event)

    def compare(
        self,
        message: str | Sequence[Message],
        *,
        conversation_id: str = "",
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        system: str | None = None,
        request_id: str = "",
    ) -> AsyncStream[CompareEvent]:
        """Streams two answers to one message: `CompareStarted`, `CompareDelta`s and one `CompareFinished` per slot.

        Choose between them with `choose`. The arguments are as in `chat`; the server sets the two temperatures.

        >>> async with client.compare("How do I catch a fish?") as stream:
        ...     async for event in stream:
        ...         if isinstance(event, CompareFinished):
        ...             print(Slot.Name(event.slot), event.text)
        SLOT_A You may try a net.
        SLOT_B A net helps.
        >>> (await client.choose(stream.comparison_id, CHOICE_B)).choice == CHOICE_B
        True
        """
        request = chat_pb2.CompareRequest(
            conversation_id=conversation_id,
            message=message if isinstance(message, str) else "",
            messages=() if isinstance(message, str) else message,
            sampling=SamplingOptions(max_tokens=max_tokens, seed=seed, stop=stop),
            request_id=request_id or _fresh_id(),
            system=system,
        )
        return self._stream(self._chat.Compare, request, compare_event)

    async def find_response(self, messages: Sequence[Message], *, system: str | None = None) -> str:
        """The id of the answer that ends a history of the caller's own.

        >>> question = Message(role=ROLE_USER, content="What do owls eat?")
        >>> answer = Message(role=ROLE_ASSISTANT, content="Mice.")
        >>> await client.find_response([question, answer])
        'resp'
        """
        request = chat_pb2.FindResponseRequest(messages=messages, system=system)
        return (await self._call(self._chat.FindResponse, request)).response_id

    async def versions(self) -> list[LiveVersion]:
        """The versions that can answer now, the one that serves first.

        >>> [version.policy_version for version in await client.versions()]
        ['v0001', 'v0000']
        """
        found = await self._call(self._chat.ListVersions, chat_pb2.ListVersionsRequest())
        return list(found.versions)

    async def refetch(self, stream: AsyncStream[ChatEvent] | AsyncStream[CompareEvent], timeout: float = 60.0) -> Turn:
        """The turn as the server stored it, for a stream that broke. Waits up to `timeout` seconds for the server to
        come back and the answer to end; raises the last PrefloopError after that.

        Raises NotStartedError if the stream broke before its Started event.

        >>> stream = client.chat("Where do owls live?")
        >>> async for event in stream:
        ...     break
        >>> turn = await client.refetch(stream)
        >>> turn.response.text
        'Owls live in trees.'
        """
        answer_id = stream.response_id or stream.comparison_id
        if not answer_id:
            raise NotStartedError(
                "The answer had not started, so nothing was stored; ask again.",
                code=grpc.StatusCode.FAILED_PRECONDITION,
            )
        end, pause = time.monotonic() + timeout, POLL_SECONDS
        missing: PrefloopError
        while True:
            try:
                # At least one second, so that the first attempt can succeed however short `timeout` is.
                left = max(1.0, min(self.timeout, end - time.monotonic()))
                found = await self._whole(stream.conversation_id, left, patience=0.0)
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
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)

    # Votes. Each method returns once the vote is on the server's disk. Each call generates a `request_id` unless one is
    # given, so that a retried vote counts once. A `request_id` used before returns the first response again.

    async def thumb(
        self, response_id: str, thumb: Thumb.ValueType, *, comment: str = "", request_id: str = ""
    ) -> Feedback:
        """Sets the user's thumb on an answer; a later one replaces it.

        >>> (await client.thumb("resp", THUMB_UP, comment="nice")).feedback_id
        'fb'
        """
        request = feedback_pb2.SubmitThumbRequest(
            response_id=response_id, thumb=thumb, comment=comment, request_id=request_id or _fresh_id()
        )
        return (await self._call(self._feedback.SubmitThumb, request)).feedback

    async def choose(
        self, comparison_id: str, choice: Choice.ValueType, *, comment: str = "", request_id: str = ""
    ) -> Feedback:
        """Sets the user's choice between two finished answers; the first choice decides which one continues the
        conversation.

        >>> (await client.choose("cmp", CHOICE_TIE)).feedback_id
        'fb'
        """
        request = feedback_pb2.SubmitChoiceRequest(
            comparison_id=comparison_id, choice=choice, comment=comment, request_id=request_id or _fresh_id()
        )
        return (await self._call(self._feedback.SubmitChoice, request)).feedback

    async def choose_pair(
        self, earlier: str, later: str, choice: Choice.ValueType, *, comment: str = "", request_id: str = ""
    ) -> Feedback:
        """Sets the user's choice between two answers to the same messages that they saw one after another, by the
        answers' ids; the earlier one is A.

        >>> (await client.choose_pair("resp", "resp2", CHOICE_B)).choice == CHOICE_B
        True
        """
        request = feedback_pb2.SubmitPairChoiceRequest(
            response_id_a=earlier,
            response_id_b=later,
            choice=choice,
            comment=comment,
            request_id=request_id or _fresh_id(),
        )
        return (await self._call(self._feedback.SubmitPairChoice, request)).feedback

    async def correct(self, response_id: str, text: str, *, request_id: str = "") -> Feedback:
        """Sets the text that the answer should have had.

        >>> (await client.correct("resp", "Owls nest in hollow trees.")).correction
        'Owls nest in hollow trees.'
        """
        request = feedback_pb2.SubmitCorrectionRequest(
            response_id=response_id, text=text, request_id=request_id or _fresh_id()
        )
        return (await self._call(self._feedback.SubmitCorrection, request)).feedback

    async def demonstrate(self, messages: list[Message], *, request_id: str = "") -> Feedback:
        """Submits a whole example conversation; the last message is the assistant's.

        >>> question = Message(role=ROLE_USER, content="What do owls eat?")
        >>> answer = Message(role=ROLE_ASSISTANT, content="Mice.")
        >>> (await client.demonstrate([question, answer])).demonstration.messages[-1].content
        'Mice.'
        """
        request = feedback_pb2.SubmitDemonstrationRequest(messages=messages, request_id=request_id or _fresh_id())
        return (await self._call(self._feedback.SubmitDemonstration, request)).feedback

    async def review(self) -> GetReviewResponse:
        """A pair of answers to compare apart from the user's chats, and how many wait; `choose` decides it. Without a
        pair `review` is unset. Until it is decided, every call returns the same pair.

        >>> (await client.review()).review.comparison.comparison_id
        'cmp'
        """
        return await self._call(self._review.GetReview, review_pb2.GetReviewRequest())

    async def skip_review(self, comparison_id: str) -> None:
        """Leaves a pair without a choice, so that `review` goes on to the next.

        >>> await client.skip_review("cmp")
        """
        await self._call(self._review.SkipReview, review_pb2.SkipReviewRequest(comparison_id=comparison_id))

    async def retract(self, feedback_id: str) -> None:
        """Retracts the user's own feedback.

        >>> await client.retract("fb")
        """
        await self._call_once(
            self._feedback.RetractFeedback, feedback_pb2.RetractFeedbackRequest(feedback_id=feedback_id)
        )

    async def feedback(self) -> AsyncIterator[Feedback]:
        """The user's current feedback, newest first, fetched page by page on demand.

        >>> [vote.feedback_id async for vote in client.feedback()]
        ['late', 'early']
        """
        async for page in self._pages(
            self._feedback.ListFeedback, lambda token: feedback_pb2.ListFeedbackRequest(page_token=token)
        ):
            for vote in page.feedback:
                yield vote

    # History

    async def conversation(self, conversation_id: str) -> Conversation:
        """One conversation with its turns, votes and version spans.

        >>> (await client.conversation("conv")).conversation_id
        'conv'
        """
        return await self._whole(conversation_id, self.timeout, self.patience)

    async def conversations(self) -> AsyncIterator[Conversation]:
        """The user's conversations without their turns, newest first, fetched page by page on demand.

        >>> [conversation.title async for conversation in client.conversations()]
        ['newer', 'older']
        """
        async for page in self._pages(
            self._chat.ListConversations, lambda token: chat_pb2.ListConversationsRequest(page_token=token)
        ):
            for conversation in page.conversations:
                yield conversation

    async def delete_conversation(self, conversation_id: str) -> None:
        """Deletes a conversation from the user's history.

        >>> await client.delete_conversation("conv")
        """
        request = chat_pb2.DeleteConversationRequest(conversation_id=conversation_id)
        await self._call_once(self._chat.DeleteConversation, request)

    # Personal data

    async def caller(self) -> GetCallerResponse:
        """The user and role that the credentials belong to.

        >>> caller = await client.caller()
        >>> caller.user, caller.role
        ('ana', 'operator')
        """
        return await self._call(self._account.GetCaller, account_pb2.GetCallerRequest())

    def export_user(self, user: str = "") -> AsyncStream[ExportUserResponse]:
        """Streams all data stored about the caller, or, for operators, about another `user`.

        >>> [part.WhichOneof("event") async for part in client.export_user()]
        ['conversation', 'key']
        """
        return self._stream(self._account.ExportUser, account_pb2.ExportUserRequest(user=user), lambda part: part)

    async def forget_user(self, user: str = "") -> ForgetUserResponse:
        """Permanently deletes all data stored about the caller, keys included, or, for operators, about another `user`.
        The response names the versions that learned from it.

        >>> (await client.forget_user("ben")).policy_versions
        ['v0001']
        """
        request = account_pb2.ForgetUserRequest(user=user)
        return await self._call_once(self._account.ForgetUser, request, self.stream_timeout)

    # Policies and rounds, for operators

    async def active_policy(self) -> GetActivePolicyResponse:
        """The policy that should serve (`policy`), the version each server has loaded (`replicas`), the version that
        `rollback` would activate (`rollback_version`), and the votes if two versions are being compared (`duel`).

        >>> (await client.active_policy()).policy.version
        'v0001'
        """
        return await self._call(self._policy.GetActivePolicy, policy_pb2.GetActivePolicyRequest())

    async def policies(self) -> AsyncIterator[Policy]:
        """Every published version, newest first.

        >>> [policy.version async for policy in client.policies()]
        ['v0001', 'v0000']
        """
        async for page in self._pages(
            self._policy.ListPolicies, lambda token: policy_pb2.ListPoliciesRequest(page_token=token)
        ):
            for policy in page.policies:
                yield policy

    async def activate(self, version: str, *, expected_active_version: str | None = None, reason: str = "") -> Policy:
        """Makes `version` the active one; returns when the server serves it. `reason` is stored with the change.

        Raises ConflictError if `expected_active_version` is given and another version is active.

        >>> (await client.activate("v0002", expected_active_version="v0001", reason="It reads better.")).version
        'v0002'
        """
        request = policy_pb2.ActivatePolicyRequest(
            version=version, expected_active_version=expected_active_version, reason=reason
        )
        return (await self._call_once(self._policy.ActivatePolicy, request)).policy

    async def rollback(
        self, version: str = "", *, expected_active_version: str | None = None, reason: str = ""
    ) -> Policy:
        """Activates a version that was active before, by default the most recent one. Otherwise as `activate`.

        >>> (await client.rollback(reason="It rambles.")).version
        'v0000'
        """
        request = policy_pb2.RollbackPolicyRequest(
            version=version, expected_active_version=expected_active_version, reason=reason
        )
        return (await self._call_once(self._policy.RollbackPolicy, request)).policy

    async def rounds(self) -> AsyncIterator[Round]:
        """The learner's rounds, newest first.

        >>> [each.round_id async for each in client.rounds()]
        ['round_2', 'round_1']
        """
        async for page in self._pages(
            self._policy.ListRounds, lambda token: policy_pb2.ListRoundsRequest(page_token=token)
        ):
            for each in page.rounds:
                yield each

    async def round_samples(self, round_id: str) -> AsyncIterator[RoundSample]:
        """The answers to held-out prompts before and after a round.

        >>> [(sample.before, sample.after) async for sample in client.round_samples("round_2")]
        [('In trees.', 'Owls live in hollow trees.')]
        """
        async for page in self._pages(
            self._policy.ListRoundSamples,
            lambda token: policy_pb2.ListRoundSamplesRequest(round_id=round_id, page_token=token),
        ):
            for sample in page.samples:
                yield sample

    async def count_votes(self, days: int = 30) -> list[VoteCount]:
        """Votes per day (UTC) and kind over the last `days` days, oldest first.

        >>> [(count.date, count.votes) for count in await client.count_votes(days=7)]
        [('2026-03-14', 5)]
        """
        return list((await self._call(self._policy.CountVotes, policy_pb2.CountVotesRequest(days=days))).counts)

    async def learner(self) -> Learner:
        """Whether a learner is listening for requests, its current state, and the outcome of the last request.

        >>> learner = await client.learner()
        >>> learner.listening, learner.new_votes
        (True, 5)
        """
        return (await self._call(self._policy.GetLearner, policy_pb2.GetLearnerRequest())).learner

    async def request_round(self) -> Learner:
        """Asks the listening learner to run a round now; returns before it starts.

        Raises ConflictError with `reason` NO_LEARNER if no learner is listening, ROUND_RUNNING if a round is running.

        >>> (await client.request_round()).HasField("request_time")
        True
        """
        return (await self._call_once(self._policy.RequestRound, policy_pb2.RequestRoundRequest())).learner

    # Health

    async def check(self, timeout: float = 5.0) -> None:
        """Raises UnavailableError unless a server answers within `timeout` seconds and is ready to chat.

        >>> await client.check()
        """
        health: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(HEALTH_METHOD)
        answer = await self._call_once(health, HEALTH_REQUEST, timeout)
        if answer != HEALTH_SERVING:
            raise UnavailableError(
                f"The server at {self.address} is starting or stopping; try again in a moment.",
                code=grpc.StatusCode.UNAVAILABLE,
            )

    async def wait_until_serving(self, timeout: float) -> None:
        """Returns once the server is ready to chat; raises the last PrefloopError after `timeout` seconds, or
        UntrustedError at once.

        >>> await client.wait_until_serving(timeout=60)
        """
        end = time.monotonic() + timeout
        while True:
            try:
                return await self.check()
            except UntrustedError:
                raise
            except PrefloopError:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(POLL_SECONDS)

    async def _whole(self, conversation_id: str, timeout: float, patience: float) -> Conversation:
        """A conversation with all its turns, fetched page by page."""
        whole, token = Conversation(), ""
        while True:
            request = chat_pb2.GetConversationRequest(conversation_id=conversation_id, page_token=token)
            page = await self._attempt(self._chat.GetConversation, request, timeout, patience)
            whole.MergeFrom(page.conversation)
            token = page.next_page_token
            if not token:
                return whole

    async def _call(self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Reply], request: Request) -> Reply:
        """A call that may be retried, because it changes nothing or has a `request_id`."""
        return await self._attempt(method, request, self.timeout, self.patience)

    async def _call_once(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Reply],
        request: Request,
        timeout: float | None = None,
    ) -> Reply:
        """A call that is not retried, because it is not idempotent or is part of a longer wait."""
        return await self._attempt(method, request, timeout or self.timeout, patience=0.0)

    async def _attempt(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Reply],
        request: Request,
        timeout: float,
        patience: float,
    ) -> Reply:
        return await async_reply(
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
        method: Callable[..., AsyncStreamingCall[Reply]],
        request: Request,
        unwrap: Callable[[Reply], Event | None],
    ) -> AsyncStream[Event]:
        return AsyncStream(
            lambda: method(request, timeout=self.stream_timeout, metadata=self._metadata),
            unwrap,
            address=self.address,
            backoff=Backoff(self.patience, self.on_wait),
            pauses=self._pauses,
        )

    async def _pages(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, PageT], request_for: Callable[[str], Request]
    ) -> AsyncIterator[PageT]:
        token = ""
        while True:
            page = await self._call(method, request_for(token))
            yield page
            token = page.next_page_token
            if not token:
                return


def _credentials(api_key: str | None, user: str | None, end_user: str | None) -> Metadata:
    # gRPC would reject other characters too, but only during a call and with unclear errors.
    for name in (user, end_user):
        if name is not None and not (name and name.isascii() and name.isprintable()):
            raise ValueError("A user name must be one or more printable ASCII characters.")
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("An API key must contain only printable ASCII characters.")
    given = {"authorization": f"Bearer {api_key}"} if api_key else {"x-user-id": user} if user else {}
    return tuple((given | ({"x-end-user": end_user} if end_user else {})).items())


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
