"""The prompts that people are asked to compare answers to: from the shipped pool and the operator's files, for
everybody, and users' own, which only they see again.

Own prompts are first messages of conversations that train: no one is shown what the gate judges by.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median_low

import torch

from learner.round.prompts import ANSWER_TOKENS
from learner.round.workspace import Workspace
from server.shared.model.text import UnknownTokenError
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


@cache
def shipped() -> list[str]:
    """The 500 prompts that come with the project."""
    return Path(__file__).with_name("pool.txt").read_text(encoding="utf-8").splitlines()


def pool(files: tuple[Path, ...]) -> list[str]:
    """The shipped prompts and those of the files, one per line, each once. Raises OSError and UnicodeDecodeError."""
    lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys([*filter(None, lines), *shipped()]))


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
    review = work.settings.review
    lengths = [prompt.max_tokens for prompt in work.prompts.train if prompt.conversation_id]
    length = median_low(lengths) if lengths else ANSWER_TOKENS
    texts, own = pool(review.prompt_files), len(pool(review.prompt_files)) - len(shipped())
    order = torch.randperm(len(texts), generator=work.generator(STREAM)).tolist()
    # The operator's prompts are about what people ask here.
    order.sort(key=lambda place: place >= own)
    chosen: list[ReviewPrompt] = []
    for place in order:
        messages = [{"role": "user", "content": texts[place]}]
        try:
            token_ids = work.encode_chat(messages)
        except UnknownTokenError:
            continue
        if len(token_ids) + length <= work.longest_rollout:
            chosen.append(ReviewPrompt(Prompt("", token_ids, length), messages))
        if len(chosen) == review.pairs:
            break
    return chosen
