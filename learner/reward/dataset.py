"""Turns rows of the store into votes over a list of answers.

Each conversation either trains or judges. A hash of its id decides, so its side never changes as votes come in.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from learner.model.features import TokenPair
from learner.reward.likelihood import BOTH_BAD, TIE, A, B
from learner.reward.linear_heads import VoteTensors
from learner.reward.machine_votes import agreement, machine_weight
from learner.reward.vote_weights import vote_weights
from learner.settings import RewardSettings
from server.shared.model.text import UnknownTokenError
from server.store.chats.records import ChoiceVote, Correction, Response, Snapshot, ThumbVote
from server.store.learning.records import Side

OUTCOMES = {"A": A, "B": B, "TIE": TIE, "BOTH_BAD": BOTH_BAD}

# Token ids of an answer's text, with EOS or without it.
Encode = Callable[[str, bool], list[int]]


@dataclass(frozen=True)
class Dataset:
    """All votes of a snapshot over `answers`; `judges` (groups,) is True for conversations that judge. `feedback_ids`
    are the ids of the votes, choices and corrections first, then thumbs; in the same order, `voters` (C + M,) are
    indices into `users`."""

    answers: list[TokenPair]
    votes: VoteTensors
    # Ids of the conversations, (groups,).
    conversations: list[str]
    judges: Tensor
    feedback_ids: list[str]
    users: list[str]
    voters: Tensor
    # (C,) whether a choice was between two answers that were shown; False for corrections, which only train.
    compared: Tensor
    # (users,) from 0 to 1, whether they vote with the others (`learner.reward.voter_reliability`); 1 until this is
    # known.
    reliability: Tensor
    # (C + M,) whether a machine judge gave the vote; such votes only train.
    by_machine: Tensor
    # Votes on answers without tokens, too long with their prompt, or with tokens that the model has no embedding for.
    left_out: int = 0

    @property
    def train(self) -> VoteTensors:
        """The votes that the reward model is fitted on."""
        return select(self.votes, ~self.judges)

    @property
    def judge(self) -> VoteTensors:
        """The votes that are only used to judge."""
        return select(self.votes, self.judges)

    @property
    def shown(self) -> tuple[VoteTensors, list[str]]:
        """The votes on answers that were shown, which leaves out corrections, and the ids of their conversations."""
        groups = torch.zeros_like(self.judges)
        groups[self.votes.choice_group[self.compared]] = True
        groups[self.votes.thumb_group] = True
        return select(self.votes, groups, self.compared), of_groups(self.conversations, groups)

    @property
    def judging(self) -> Tensor:
        """(C + M,) whether the vote judges."""
        return self.judges[torch.cat([self.votes.choice_group, self.votes.thumb_group])]

    @property
    def sides(self) -> list[tuple[str, Side]]:
        """Each vote's feedback id and its side."""
        sides: list[Side] = ["judge" if judges else "train" for judges in self.judging.tolist()]
        return list(zip(self.feedback_ids, sides, strict=True))


def is_judge(conversation_id: str, judge_share: float) -> bool:
    """Whether the conversation's votes judge: a hash of its id, uniform in [0, 1), against the share."""
    digest = hashlib.sha256(conversation_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < judge_share


def select(votes: VoteTensors, groups: Tensor, choices: Tensor | None = None) -> VoteTensors:
    """The votes of conversations for which `groups` (G,) is True, with conversations renumbered without gaps; of the
    choices only those for which `choices` (C,) is True, too."""
    c, m = groups[votes.choice_group], groups[votes.thumb_group]
    c = c if choices is None else c & choices
    number = groups.cumsum(0) - 1
    kept = votes.at(c, m)
    return replace(kept, choice_group=number[kept.choice_group], thumb_group=number[kept.thumb_group])


def of_groups(conversations: list[str], groups: Tensor) -> list[str]:
    """The conversations for which `groups` (G,) is True."""
    return [conversation for conversation, kept in zip(conversations, groups.tolist(), strict=True) if kept]


def some_conversations(votes: VoteTensors, limit: int, generator: torch.Generator) -> Tensor:
    """(G,) True for conversations, drawn at random, with about `limit` votes; for all if there are no more."""
    if len(votes) <= limit:
        return torch.ones(votes.groups, dtype=torch.bool)
    chosen = torch.zeros(votes.groups, dtype=torch.bool)
    chosen[torch.randperm(votes.groups, generator=generator)[: round(votes.groups * limit / len(votes))]] = True
    return chosen


class ChoiceRow(NamedTuple):
    """One choice between two answers, `a` and `b`. A correction is a choice that the corrected text won."""

    a: int
    b: int
    outcome: int
    # Temperature of a minus that of b.
    temperature_difference: float
    conversation: int
    user: int
    create_time: float
    feedback_id: str


class ThumbRow(NamedTuple):
    """One thumb, +1.0 or -1.0."""

    response: int
    thumb: float
    conversation: int
    user: int
    create_time: float
    feedback_id: str


def to_dataset(
    snapshot: Snapshot,
    now: float,
    judge_share: float,
    settings: RewardSettings,
    encode: Encode,
    longest: float = math.inf,
    embeddings: float = math.inf,
) -> Dataset:
    """The dataset of a snapshot. `now` is in seconds since 1970; `encode` returns the token ids of a corrected text, or
    raises UnknownTokenError. Answers without tokens, with more than `longest` including their prompt, or with token ids
    from `embeddings` on, are left out with their votes, and so are corrections that change nothing.

    A correction ends with EOS only if the answer did, or a reward model would learn to like EOS from answers that the
    length limit cut. Corrections only train: a corrected text is no sample of a policy, so it says little about how
    well a model tells samples apart."""
    rows = _Rows(encode, longest, embeddings)
    choices = [row for choice in snapshot.choices if (row := rows.of_choice(choice))]
    compared = len(choices)
    training = [one for one in snapshot.corrections if not is_judge(one.response.conversation_id, judge_share)]
    choices += [row for correction in training if (row := rows.of_correction(correction))]
    people = len(choices)
    judged = [vote for vote in snapshot.machine if not is_judge(vote.conversation_id, judge_share)]
    # What counts nothing is left out, so that it chooses no penalty either.
    trust = agreement(judged, snapshot.choices).weight
    judged = judged if trust else []
    choices += [row for vote in judged if (row := rows.of_choice(vote))]
    thumbs = [thumb for vote in snapshot.thumbs if (thumb := rows.of_thumb(vote))]
    votes: list[ChoiceRow | ThumbRow] = [*choices, *thumbs]
    voters = _integers(vote.user for vote in votes)
    numbers = torch.arange(len(votes))
    by_machine = (people <= numbers) & (numbers < len(choices))
    judges = torch.tensor([is_judge(c, judge_share) for c in rows.conversations], dtype=torch.bool)
    weights = _weights(votes, now, voters, by_machine, judges, trust, settings)
    given = len(snapshot.choices) + len(training) + len(judged) + len(snapshot.thumbs)
    return Dataset(
        answers=rows.answers,
        votes=_vote_tensors(choices, thumbs, weights, max(len(rows.users), 1)),
        conversations=list(rows.conversations),
        judges=judges,
        feedback_ids=[vote.feedback_id for vote in votes],
        users=list(rows.users),
        voters=voters,
        compared=torch.arange(len(choices)) < compared,
        reliability=torch.ones(len(rows.users)),
        by_machine=by_machine,
        left_out=given - len(votes),
    )


def _weights(
    votes: Sequence[ChoiceRow | ThumbRow],
    now: float,
    voters: Tensor,
    by_machine: Tensor,
    judges: Tensor,
    trust: float,
    settings: RewardSettings,
) -> Tensor:
    """(V,) weights: of people's votes by age and by user, of a machine judge's by `trust` and its share."""
    ages = (now - torch.tensor([vote.create_time for vote in votes], dtype=torch.float64)) / 86400
    ages, own, weights = ages.clamp(min=0).float(), ~by_machine, torch.zeros(len(votes))
    weights[own] = vote_weights(
        ages[own], voters[own], settings.half_life_days, settings.age_floor, settings.user_share
    )
    of_people = float(weights[~judges[_integers(vote.conversation for vote in votes)]].sum())
    weights[by_machine] = machine_weight(trust, int(by_machine.sum()), of_people, settings.machine_share)
    return weights


def count_sides(snapshot: Snapshot, judge_share: float) -> tuple[int, int]:
    """How many votes a dataset would have to train on and to judge by, without building it or checking lengths."""
    said = [vote.conversation_id for vote in snapshot.choices if vote.a.token_ids and vote.b.token_ids]
    said += [vote.response.conversation_id for vote in snapshot.thumbs if vote.response.token_ids]
    judging = sum(is_judge(conversation, judge_share) for conversation in said)
    return len(said) - judging + len(usable_corrections(snapshot, judge_share)), judging


def usable_corrections(snapshot: Snapshot, judge_share: float) -> list[Correction]:
    """The corrections that say something, in conversations that train."""
    return [
        vote
        for vote in snapshot.corrections
        if vote.changes and not is_judge(vote.response.conversation_id, judge_share)
    ]


class _Rows:
    """Numbers answers, conversations and users in order of appearance, and makes rows of usable votes."""

    def __init__(self, encode: Encode, longest: float, embeddings: float) -> None:
        self._encode = encode
        self._longest = longest
        self._embeddings = embeddings
        self._numbers: dict[str, int] = {}
        self.answers: list[TokenPair] = []
        self.conversations: dict[str, int] = {}
        self.users: dict[str, int] = {}

    def of_choice(self, vote: ChoiceVote) -> ChoiceRow | None:
        if not (self._readable(vote.a) and self._readable(vote.b)):
            return None
        a, b = self._response(vote.a), self._response(vote.b)
        difference = vote.a.temperature - vote.b.temperature
        return ChoiceRow(a, b, OUTCOMES[vote.choice], difference, *self._said_by(vote, vote.conversation_id))

    def of_correction(self, vote: Correction) -> ChoiceRow | None:
        prompt = vote.response.prompt_token_ids
        if not vote.changes:
            return None
        try:
            tokens = self._encode(vote.text, vote.response.finish_reason == "stop")
        except UnknownTokenError:
            return None
        if not (self._readable(vote.response) and self._fits(prompt, tokens)):
            return None
        written, replaced = self._answer(vote.feedback_id, prompt, tokens), self._response(vote.response)
        return ChoiceRow(written, replaced, A, 0.0, *self._said_by(vote, vote.response.conversation_id))

    def of_thumb(self, vote: ThumbVote) -> ThumbRow | None:
        if not self._readable(vote.response):
            return None
        return ThumbRow(
            self._response(vote.response), float(vote.value), *self._said_by(vote, vote.response.conversation_id)
        )

    def _said_by(self, vote: ChoiceVote | Correction | ThumbVote, conversation: str) -> tuple[int, int, float, str]:
        """The conversation, the user, the time, and the vote's id."""
        number = self.conversations.setdefault(conversation, len(self.conversations))
        return number, self.users.setdefault(vote.user, len(self.users)), vote.create_time, vote.feedback_id

    def _response(self, response: Response) -> int:
        return self._answer(response.id, response.prompt_token_ids, response.token_ids)

    def _answer(self, key: str, prompt: list[int], tokens: list[int]) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.answers)
            self.answers.append((prompt, tokens))
        return self._numbers[key]

    def _readable(self, response: Response) -> bool:
        return self._fits(response.prompt_token_ids, response.token_ids)

    def _fits(self, prompt: list[int], tokens: list[int]) -> bool:
        if not tokens or len(prompt) + len(tokens) > self._longest:
            return False
        return max(max(prompt, default=0), max(tokens)) < self._embeddings


def _vote_tensors(choices: list[ChoiceRow], thumbs: list[ThumbRow], weights: Tensor, users: int) -> VoteTensors:
    differences = [row.temperature_difference for row in choices]
    return VoteTensors(
        a=_integers(row.a for row in choices),
        b=_integers(row.b for row in choices),
        outcome=_integers(row.outcome for row in choices),
        temperature_difference=torch.tensor(differences, dtype=torch.float32),
        choice_weight=weights[: len(choices)],
        choice_group=_integers(row.conversation for row in choices),
        response=_integers(row.response for row in thumbs),
        thumb=torch.tensor([row.thumb for row in thumbs], dtype=torch.float32),
        user=_integers(row.user for row in thumbs),
        thumb_weight=weights[len(choices) :],
        thumb_group=_integers(row.conversation for row in thumbs),
        users=users,
    )


def _integers(column: Iterable[int]) -> Tensor:
    return torch.tensor(list(column), dtype=torch.long)
