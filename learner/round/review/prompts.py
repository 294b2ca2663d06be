"""The prompts that people are asked to compare answers to: from the shipped pool and the operator's files, for
everybody, and users' own, which only they see again.

Own prompts are first messages of conversations that train: no one is shown what the gate judges by.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from learner.round.review.pool import from_pool
from learner.round.workspace import Workspace
from server.store.chats.records import Prompt

# Stream of the random choice of prompts.
STREAM = 6


@dataclass(frozen=True)
class ReviewPrompt:
    """A prompt with its text. `conversation_id` and `user` are set if only its user may see it."""

    asked: Prompt
    messages: list[dict[str, str]]
    conversation_id: str | None = None
    user: str = ""


def review_prompts(work: Workspace) -> list[ReviewPrompt]:
    """Own prompts of users first, then some of the pool: the operator's, then shipped ones at random."""
    return [*_own(work), *_from_pool(work)]


def _own(work: Workspace) -> list[ReviewPrompt]:
    """At most `own_pairs` of each user, the newest, and at most `pairs` together."""
    review, chosen, count = work.settings.review, list[ReviewPrompt](), Counter[str]()
    for prompt in reversed(work.prompts.train):
        # Only the first message of a conversation can be shown by itself.
        if prompt.opened_by and count[prompt.user] < review.own_pairs and len(chosen) < review.pairs:
            count[prompt.user] += 1
            messages = [{"role": "user", "content": prompt.opening}]
            user = "" if review.share_prompts else prompt.user
            chosen.append(ReviewPrompt(prompt, messages, prompt.conversation_id, user))
    return chosen


def _from_pool(work: Workspace) -> list[ReviewPrompt]:
    some = islice(from_pool(work, STREAM), work.settings.review.pairs)
    return [ReviewPrompt(prompt, [{"role": "user", "content": text}]) for text, prompt in some]
