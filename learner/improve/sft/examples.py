"""What supervised fine-tuning imitates: answers that people demonstrated, and corrected answers.

Some topics are held out, to stop by and to judge by: never one that the weights were trained on before. An example
counts by its tokens; what a user, or a conversation, has of all tokens is capped as votes are.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from learner.improve_settings import SFTSettings
from learner.model.features import TokenPair
from learner.model.forward import Tokens, to_tokens
from learner.reward.dataset import Encode
from learner.reward.vote_weights import cap_shares
from server.store.chats.records import Correction, Demonstration
from server.store.learning.records import Side

# With fewer examples to train on, or topics held out, nothing can be learned or stopped.
MIN_TRAIN, MIN_HELD_OUT = 4, 2
# How often each cap is applied.
TURNS = 5

# Token ids of a conversation up to its next answer, which began at a time in seconds since 1970.
EncodePrompt = Callable[[list[dict[str, str]], float], list[int]]
# A prompt as readable text, from its token ids.
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Example:
    """An answer to imitate. Examples of one `question`, as text, or of one conversation are all trained on or all held
    out."""

    feedback_id: str
    user: str
    conversation: str
    question: str
    tokens: TokenPair


@dataclass(frozen=True)
class Examples:
    """Examples, and the weight of each, (N,)."""

    examples: list[Example]
    weights: Tensor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, numbers: Tensor) -> "Examples":
        return Examples([self.examples[number] for number in numbers.tolist()], self.weights[numbers])

    @property
    def tokens(self) -> Tokens:
        """Their answers as a batch."""
        prompts, answers = zip(*(example.tokens for example in self.examples), strict=True)
        return to_tokens(list(prompts), list(answers))

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) tokens of each answer."""
        return torch.tensor([len(example.tokens[1]) for example in self.examples])

    @property
    def weight(self) -> float:
        """The weighted number of tokens."""
        return float((self.weights * self.lengths).sum())

    @property
    def digest(self) -> str:
        """Differs for other examples, or the same in another order."""
        said = [[example.tokens for example in self.examples], self.weights.tolist()]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Examples to train on and examples held out."""

    train: Examples
    held_out: Examples
    # The topic of each example held out.
    topics: list[str]

    @property
    def sides(self) -> list[tuple[str, Side]]:
        """Each example's feedback id and its side."""
        train: list[tuple[str, Side]] = [(example.feedback_id, "train") for example in self.train.examples]
        return train + [(example.feedback_id, "judge") for example in self.held_out.examples]

    @property
    def too_few(self) -> bool:
        return len(self.train) < MIN_TRAIN or len(set(self.topics)) < MIN_HELD_OUT


def to_examples(
    demonstrations: Iterable[Demonstration],
    corrections: Iterable[Correction],
    encode_prompt: EncodePrompt,
    encode: Encode,
    decode: Decode,
    longest: int,
) -> list[Example]:
    """The examples that this model can read, of at most `longest` tokens."""
    read = [
        (one.feedback_id, one.user, one.feedback_id, demonstrated(one, encode_prompt, encode)) for one in demonstrations
    ]
    read += [(one.feedback_id, one.user, one.response.conversation_id, corrected(one, encode)) for one in corrections]
    return [
        Example(feedback_id, user, conversation, decode(tokens[0]), tokens)
        for feedback_id, user, conversation, tokens in read
        if tokens and all(tokens) and sum(map(len, tokens)) <= longest
    ]


def demonstrated(shown: Demonstration, encode_prompt: EncodePrompt, encode: Encode) -> TokenPair | None:
    """The last message of a demonstration after those before it; None if they cannot be encoded."""
    *before, answer = shown.messages
    try:
        return encode_prompt(before, shown.create_time), encode(answer["content"], True)
    except ValueError:
        return None


def corrected(vote: Correction, encode: Encode) -> TokenPair | None:
    """A corrected answer, which ends with EOS only if the answer did; None if it cannot be encoded."""
    try:
        return vote.response.prompt_token_ids, encode(vote.text, vote.response.finish_reason == "stop")
    except ValueError:
        return None


def split(examples: list[Example], trained: Collection[str], settings: SFTSettings, user_share: float) -> Split:
    """Holds out a share of the topics, at least two, but none of an example in `trained`, by feedback id: a version
    that was trained on it knows its answer. A hash of the topic decides, so that later examples change little."""
    of = topics(examples)
    known = {topic for one, topic in zip(examples, of, strict=True) if one.feedback_id in trained}
    ordered = sorted(set(of), key=lambda topic: hashlib.sha256(topic.encode()).digest())
    count = max(round(settings.held_out_share * len(ordered)), MIN_HELD_OUT)
    held_out = set([topic for topic in ordered if topic not in known][:count])
    train, rest = (
        [one for one, topic in zip(examples, of, strict=True) if (topic in held_out) is wanted]
        for wanted in (False, True)
    )
    shares = settings.conversation_share, user_share
    return Split(weigh(train, *shares), weigh(rest, *shares), [topic for topic in of if topic in held_out])


def topics(examples: list[Example]) -> list[str]:
    """What each example is about: the same for examples of one question, and for those of one conversation."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for one in examples:
        first, second = sorted((find(f"question {one.question}"), find(f"conversation {one.conversation}")))
        leader[second] = first
    return [find(f"question {one.question}") for one in examples]


def weigh(examples: list[Example], conversation_share: float, user_share: float) -> Examples:
    """Weights after which no user has more than their share of the weighted tokens, as of votes, and nearly no
    conversation: what one cap takes away changes the others' shares, so they take turns."""
    found = Examples(examples, torch.ones(len(examples)))
    caps = [
        (numbered([one.conversation for one in examples]), conversation_share),
        (numbered([one.user for one in examples]), user_share),
    ]
    for owner, share in caps * TURNS:
        totals = torch.zeros(len(examples)).scatter_add_(0, owner, found.weights * found.lengths)
        found = Examples(examples, found.weights * cap_shares(totals, share)[owner])
    return found


def numbered(names: list[str]) -> Tensor:
    """(N,) each name's number, in order of appearance."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.long)
