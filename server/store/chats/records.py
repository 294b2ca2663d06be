"""The store's records of conversations and votes: frozen, and independent of SQL and protobuf."""

from dataclasses import dataclass, field, replace
from typing import Literal

Slot = Literal["A", "B"]
Choice = Literal["A", "B", "TIE", "BOTH_BAD"]
Kind = Literal["thumb", "choice", "correction", "demonstration"]
ConversationKind = Literal["chat", "review"]
# "stop": the model ended the answer; "stop_sequence": the caller's sequence came.
FinishReason = Literal["stop", "stop_sequence", "length", "cancelled", "error"]
Status = Literal["streaming", "finished", "cancelled", "failed"]


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` - 1 of a response were sampled from one policy version."""

    start: int
    end: int
    policy_version: str
    # These tokens attended to another version's KV cache.
    stale_kv: bool = False


@dataclass(frozen=True)
class Generation:
    """An engine's result for a prompt: the part of a response that is known only at its end."""

    token_ids: list[int]
    # Log-probabilities of the sampled tokens under the policy that sampled them, at the sampling temperature.
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    spans: list[Span]


@dataclass(frozen=True)
class Response:
    """One sampled answer, attributable token by token."""

    id: str
    conversation_id: str
    user: str
    status: Status
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    temperature: float
    max_tokens: int
    seed: int | None
    finish_reason: FinishReason | None
    # The version that was served when the response began; `spans` have the version of each token.
    policy_version: str
    create_time: float
    spans: list[Span] = field(default_factory=list)
    # The reward model that chose it among several answers; the others are not stored. It is not a plain sample then.
    chosen_by: str | None = None
    # It ends before the first of these that came.
    stop: tuple[str, ...] = ()

    @property
    def shown(self) -> str | None:
        """The text that was shown, empty if the model wrote none; None while it is written or if it failed without."""
        return self.text if self.status == "finished" or (self.text and self.status != "streaming") else None

    @property
    def generation(self) -> Generation:
        """The engine's result for the prompt."""
        return Generation(self.token_ids, self.logprobs, self.text, self.finish_reason or "error", self.spans)


@dataclass(frozen=True)
class Comparison:
    """Two answers to one message, shown side by side."""

    id: str
    conversation_id: str
    user: str
    a: Response
    b: Response
    state: Literal["open", "chosen", "skipped"]
    continued_with: Slot | None
    create_time: float

    @property
    def unless_chosen(self) -> Slot:
        """The slot with which a conversation continues without a choice: A, or B if only B has an answer."""
        return "B" if self.a.shown is None and self.b.shown is not None else "A"


@dataclass(frozen=True)
class Feedback:
    """A user's current feedback on one target."""

    id: str
    event_seq: int
    user: str
    kind: Kind
    response_id: str | None
    comparison_id: str | None
    # Thumb: UP or DOWN. Choice: A, B, TIE or BOTH_BAD. Correction: the text. Demonstration: messages as JSON.
    value: str
    comment: str
    create_time: float


@dataclass(frozen=True)
class OfferedAnswer:
    """One of the two answers of a pair to review, sampled whole from one version."""

    policy_version: str
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class OfferedReview:
    """A pair to review. `messages` are the prompt as shown: [{"role": ..., "content": ...}, ...], the user's last.
    Without a `conversation_id` the prompt is from a pool; otherwise it goes with its conversation. An empty `user`
    means everybody."""

    conversation_id: str | None
    user: str
    messages: list[dict[str, str]]
    prompt_token_ids: list[int]
    answers: tuple[OfferedAnswer, OfferedAnswer]
    temperature: float
    max_tokens: int
    # The system prompt that the model read, which is not shown.
    system: str = ""
    # The answers end before the first of these that came.
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Review:
    """A pair that a user was given."""

    messages: list[dict[str, str]]
    comparison: Comparison


@dataclass(frozen=True)
class Turn:
    """One user message and its answer; exactly one of `response`, `comparison` and `given_answer` is set."""

    seq: int
    message: str
    create_time: float
    dropped: bool
    response: Response | None
    comparison: Comparison | None
    # An answer of a caller's own history, which no version sampled.
    given_answer: str | None = None
    # The `seq` of the turn that this one continues. With a caller's own history several may continue one.
    parent: int | None = None

    @property
    def answer(self) -> str | None:
        """The text with which the conversation continued; None if the model must not see this turn."""
        if self.dropped:
            return None
        if self.comparison:
            # An open comparison is skipped as soon as there is a next message.
            open_ = self.comparison.state == "open"
            slot = self.comparison.unless_chosen if open_ else self.comparison.continued_with
            chosen = {"A": self.comparison.a, "B": self.comparison.b}.get(slot) if slot else None
            return chosen.shown if chosen else None
        return self.response.shown if self.response else self.given_answer


@dataclass(frozen=True)
class Place:
    """Where a turn goes: after the turn `parent` of its conversation, or at its beginning; with the digests of a
    caller's own history (`server.store.chats.histories`)."""

    parent: int | None
    history: bytes | None = None
    asked: bytes | None = None


@dataclass(frozen=True)
class RepeatedRequest:
    """A stored request; a repeat of it gets the same answer."""

    rpc: str
    request_id: str
    create_time: float


@dataclass(frozen=True)
class Conversation:
    """A conversation without its turns."""

    id: str
    user: str
    title: str
    create_time: float
    update_time: float
    # A review holds one comparison, whose answers a round sampled.
    kind: ConversationKind = "chat"
    system: str = ""  # Empty if it has none.


@dataclass(frozen=True)
class ChoiceVote:
    """A choice as the learner sees it."""

    feedback_id: str
    user: str
    choice: Choice
    comparison_id: str
    a: Response
    b: Response
    create_time: float
    # Of a review: what all choices on its prompt have in common, the conversation that it is from or the prompt itself.
    review_of: str = ""

    @property
    def conversation_id(self) -> str:
        """What decides whether it trains or judges, and which votes belong together."""
        return self.review_of or self.a.conversation_id


@dataclass(frozen=True)
class ThumbVote:
    """A thumb as the learner sees it: `value` is +1 or -1."""

    feedback_id: str
    user: str
    value: int
    response: Response
    create_time: float


@dataclass(frozen=True)
class Correction:
    """What a response should have been, as written by a user."""

    feedback_id: str
    user: str
    text: str
    response: Response
    create_time: float
    event_seq: int = 0

    @property
    def changes(self) -> bool:
        """Whether it says anything: of an answer with tokens, another text."""
        return bool(self.response.token_ids) and self.text.strip() != self.response.text.strip()


@dataclass(frozen=True)
class Demonstration:
    """A whole exemplary conversation: [{"role": ..., "content": ...}, ...], the assistant's message last."""

    feedback_id: str
    user: str
    messages: list[dict[str, str]]
    create_time: float
    event_seq: int = 0


@dataclass(frozen=True)
class Snapshot:
    """All feedback that was current at one event: the same watermark gives the same votes, except deleted ones."""

    watermark: int
    choices: list[ChoiceVote]
    thumbs: list[ThumbVote]
    corrections: list[Correction]
    demonstrations: list[Demonstration]
    # What a machine judge said of comparisons, by the judge's name instead of a user's, up to the event
    # `machine_watermark`.
    machine: list[ChoiceVote] = field(default_factory=list)
    machine_watermark: int = 0
    judge: str = ""
    # The number of deletions when it was read.
    deletions: int = 0

    def __len__(self) -> int:
        return len(self.choices) + len(self.thumbs) + len(self.corrections) + len(self.demonstrations)

    def without(self, versions: set[str]) -> "Snapshot":
        """The snapshot without votes on answers that have a token of one of these policy versions."""
        if not versions:
            return self

        def kept(*responses: Response) -> bool:
            return not any(span.policy_version in versions for response in responses for span in response.spans)

        return replace(
            self,
            choices=[vote for vote in self.choices if kept(vote.a, vote.b)],
            machine=[vote for vote in self.machine if kept(vote.a, vote.b)],
            thumbs=[vote for vote in self.thumbs if kept(vote.response)],
            corrections=[vote for vote in self.corrections if kept(vote.response)],
        )


@dataclass(frozen=True)
class Prompt:
    """A user's prompt as the model read it."""

    conversation_id: str
    token_ids: list[int]
    max_tokens: int
    # Empty: one of the project's own prompts.
    user: str = ""
    # For the first message of a conversation: the first conversation that began with it. A template may write the date,
    # so that the same question has different tokens in each.
    opened_by: str = ""
    # That message.
    opening: str = ""
    # The first answer to it, and the version that it was sampled from: they say whose tokenizer `token_ids` are of.
    response_id: str = ""
    policy_version: str = ""
    # The system prompt that it begins with, if there is one.
    system: str = ""
    # Answers end before the first of these that comes.
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeedbackEvent:
    """One event of a vote; `value` is None if its content was deleted."""

    seq: int
    action: Literal["submit", "retract", "delete"]
    feedback_id: str
    user: str
    kind: Kind
    response_id: str | None
    comparison_id: str | None
    value: str | None
    comment: str | None
    create_time: float


@dataclass(frozen=True)
class VoteCount:
    """Number of current votes of one kind that were cast on a UTC day, such as 2026-03-14."""

    date: str
    kind: Kind
    votes: int
