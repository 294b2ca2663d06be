"""Prompts that are nobody's: the operator's own, and 500 that come with the project.

People are asked to compare answers to them (`learner.round.review.prompts`), and the gate confirms a candidate on them
where there are too few held-out prompts of users.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median_low

import torch

from learner.round.prompts import ANSWER_TOKENS
from learner.round.workspace import Workspace
from server.shared.model.text import UnknownTokenError
from server.store.chats.records import Prompt


@cache
def shipped() -> list[str]:
    """The 500 prompts that come with the project."""
    return Path(__file__).with_name("pool.txt").read_text(encoding="utf-8").splitlines()


def pool(files: tuple[Path, ...]) -> list[str]:
    """The files' prompts, one per line, and the shipped ones, each once. Raises OSError and UnicodeDecodeError."""
    lines = [line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys([*filter(None, lines), *shipped()]))


def from_pool(work: Workspace, stream: int) -> Iterator[tuple[str, Prompt]]:
    """The prompts that fit, with their texts: the operator's, then shipped ones, at random. The order depends on the
    `stream`."""
    lengths = [prompt.max_tokens for prompt in work.prompts.train if prompt.conversation_id]
    length = median_low(lengths) if lengths else ANSWER_TOKENS
    texts = pool(work.settings.review.prompt_files)
    own = len(texts) - len(shipped())
    order = torch.randperm(len(texts), generator=work.generator(stream)).tolist()
    # The operator's prompts are about what people ask here.
    for place in sorted(order, key=lambda place: place >= own):
        try:
            token_ids = work.encode_chat([{"role": "user", "content": texts[place]}])
        except UnknownTokenError:
            continue
        if len(token_ids) + length <= work.longest_rollout:
            yield texts[place], Prompt("", token_ids, length, system=work.settings.system_prompt)
