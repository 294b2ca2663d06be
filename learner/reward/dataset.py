"""Rows of the store become votes over a list of answers; each conversation trains or judges, for good.

The side is a hash of the conversation's id, so it never changes as votes come in.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.model.features import TokenPair
from learner.reward.likelihood import BOTH_BAD, TIE, A, B
from learner.reward.linear_heads import VoteTensors, vote_weights
from learner.settings import RewardSettings
from server.store.chats.records import Response, Snapshot
from server.store.learning.records import Side

OUTCOMES = {"A": A, "B": B, "TIE": TIE, "BOTH_BAD": BOTH_BAD}


@dataclass(frozen=True)
class Dataset:
    """All votes of a snapshot over `answers`; `judges` (groups,) is True for conversations that judge. `feedback_ids`
    are the votes' own, choices and corrections first, then thumbs; so are `voters` (C + M,), indices into `users`."""

    answers: list[TokenPair]
    votes: VoteTensors
    judges: Tensor
    feedback_ids: list[str]
    users: list[str]
    voters: Tensor
    # (C,) whether a choice was between two answers that were shown; corrections are not.
    compared: Tensor
    # Votes on what cannot be read: an answer without a token, or one that is too long with its prompt.
    left_out: int = 0

    @property
    def train(self) -> VoteTensors:
        """The votes that the reward model is fitted on."""
        return select(self.votes, ~self.judges)

    @property
    def judge(self) -> VoteTensors:
        """The votes that only ever judge."""
        return select(self.votes, self.judges)

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


def select(votes: VoteTensors, groups: Tensor) -> VoteTensors:
    """The votes of conversations where `groups` (G,) is True, conversations numbered anew without gaps."""
    c, m = groups[votes.choice_group], groups[votes.thumb_group]
    number = groups.cumsum(0) - 1
    return VoteTensors(
        a=votes.a[c],
        b=votes.b[c],
        outcome=votes.outcome[c],
        temperature_difference=votes.temperature_difference[c],
        choice_weight=votes.choice_weight[c],
        choice_group=number[votes.choice_group[c]],
        response=votes.response[m],
        thumb=votes.thumb[m],
        user=votes.user[m],
        thumb_weight=votes.thumb_weight[m],
        thumb_group=number[votes.thumb_group[m]],
        users=votes.users,
    )


def some_conversations(votes: VoteTensors, limit: int, generator: torch.Generator) -> VoteTensors:
    """Votes of conversations drawn at random, about `limit` of them; all where they are no more."""
    if len(votes) <= limit:
        return votes
    chosen = torch.zeros(votes.groups, dtype=torch.bool)
    chosen[torch.randperm(votes.groups, generator=generator)[: round(votes.groups * limit / len(votes))]] = True
    return select(votes, chosen)


def to_dataset(
    snapshot: Snapshot,
    now: float,
    judge_share: float,
    settings: RewardSettings,
    encode: Callable[[str], list[int]],
    longest: float = math.inf,
) -> Dataset:
    """`now` in seconds since 1970; `encode` gives the token ids of a corrected text, EOS included. Answers without a
    token, and those that have more than `longest` with their prompt, are left out with their votes."""
    answers: dict[str, int] = {}
    pairs: list[TokenPair] = []
    conversations: dict[str, int] = {}
    users: dict[str, int] = {}

    def answer(key: str, prompt: list[int], tokens: list[int]) -> int:
        if key not in answers:
            answers[key] = len(pairs)
            pairs.append((prompt, tokens))
        return answers[key]

    def fits(prompt: list[int], tokens: list[int]) -> bool:
        return bool(tokens) and len(prompt) + len(tokens) <= longest

    def readable(*responses: Response) -> bool:
        return all(fits(response.prompt_token_ids, response.token_ids) for response in responses)

    def row(response: Response) -> int:
        return answer(response.id, response.prompt_token_ids, response.token_ids)

    def group(response: Response) -> int:
        return conversations.setdefault(response.conversation_id, len(conversations))

    def user(name: str) -> int:
        return users.setdefault(name, len(users))

    # a, b, outcome, temperature difference, group, user, time, feedback id
    choices = [
        (
            row(v.a),
            row(v.b),
            OUTCOMES[v.choice],
            v.a.temperature - v.b.temperature,
            group(v.a),
            user(v.user),
            v.create_time,
            v.feedback_id,
        )
        for v in snapshot.choices
        if readable(v.a, v.b)
    ]
    compared = len(choices)
    choices += [
        (
            answer(v.feedback_id, v.response.prompt_token_ids, tokens),
            row(v.response),
            A,
            0.0,
            group(v.response),
            user(v.user),
            v.create_time,
            v.feedback_id,
        )
        for v in snapshot.corrections
        if readable(v.response) and fits(v.response.prompt_token_ids, tokens := encode(v.text))
    ]
    thumbs = [
        (row(v.response), float(v.value), group(v.response), user(v.user), v.create_time, v.feedback_id)
        for v in snapshot.thumbs
        if readable(v.response)
    ]
    given = len(snapshot.choices) + len(snapshot.corrections) + len(snapshot.thumbs)
    choice_columns = list(zip(*choices, strict=True)) if choices else [()] * 8
    thumb_columns = list(zip(*thumbs, strict=True)) if thumbs else [()] * 6
    voters = torch.tensor([*choice_columns[5], *thumb_columns[3]], dtype=torch.long)
    ages = (now - torch.tensor([*choice_columns[6], *thumb_columns[4]], dtype=torch.float64)) / 86400
    weights = vote_weights(
        ages.clamp(min=0).float(), voters, settings.half_life_days, settings.age_floor, settings.user_share
    )

    def integers(column: tuple[object, ...]) -> Tensor:
        return torch.tensor(column, dtype=torch.long)

    votes = VoteTensors(
        a=integers(choice_columns[0]),
        b=integers(choice_columns[1]),
        outcome=integers(choice_columns[2]),
        temperature_difference=torch.tensor(choice_columns[3], dtype=torch.float32),
        choice_weight=weights[: len(choices)],
        choice_group=integers(choice_columns[4]),
        response=integers(thumb_columns[0]),
        thumb=torch.tensor(thumb_columns[1], dtype=torch.float32),
        user=integers(thumb_columns[3]),
        thumb_weight=weights[len(choices) :],
        thumb_group=integers(thumb_columns[2]),
        users=max(len(users), 1),
    )
    judges = torch.tensor([is_judge(c, judge_share) for c in conversations], dtype=torch.bool)
    return Dataset(
        answers=pairs,
        votes=votes,
        judges=judges,
        feedback_ids=[*choice_columns[7], *thumb_columns[5]],
        users=list(users),
        voters=voters,
        compared=torch.arange(len(choices)) < compared,
        left_out=given - len(choices) - len(thumbs),
    )
