"""The prompts that people are asked to compare answers to: from the shipped pool and the operator's files, for
everybody, and users' own, which only they see again.

Own prompts are first messages of conversations that train: no one is shown what the gate judges by.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from learner.reward.dataset import is_judge
from learner.round.review.pool import from_pool
from learner.round.workspace import Workspace
from server.store.chats.records import Prompt
from server.store.chats.reviews import review_key

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
    pairs = work.settings.review.pairs
    return [*_own(work, work.prompts.train, pairs), *islice(_from_pool(work), pairs)]


def training_prompts(work: Workspace) -> list[ReviewPrompt]:
    """The same, but only prompts whose choices train."""
    pairs, share = work.settings.review.active_pairs, work.settings.gate.judge_share
    # A choice is on the side of the prompt's conversation; the prompt, of the first one that asked it.
    own = [prompt for prompt in work.prompts.train if not is_judge(prompt.conversation_id, share)]
    nobodys = (prompt for prompt in _from_pool(work) if not is_judge(review_key(prompt.messages), share))
    return [*_own(work, own, pairs), *islice(nobodys, pairs)]


def _own(work: Workspace, prompts: list[Prompt], most: int) -> list[ReviewPrompt]:
    """At most `own_pairs` of each user, the newest, and at most `most` together."""
    review, chosen, count = work.settings.review, list[ReviewPrompt](), Counter[str]()
    for prompt in reversed(prompts):
        # Only the first message of a conversation can be shown by itself.
        if prompt.opened_by and count[prompt.user] < review.own_pairs and len(chosen) < most:
            count[prompt.user] += 1
            messages = [{"role": "user", "content": prompt.opening}]
            user = "" if review.share_prompts else prompt.user
            chosen.append(ReviewPrompt(prompt, messages, prompt.conversation_id, user))
    return chosen


def _from_pool(work: Workspace) -> Iterator[ReviewPrompt]:
    # Others in each round.
    for text, prompt in from_pool(work, STREAM + 1_000 * work.round.watermark):
        yield ReviewPrompt(prompt, [{"role": "user", "content": text}])
