"""What the model reads: the conversation so far in its chat template, trimmed from the oldest turn to fit."""

from collections.abc import Callable, Sequence

from server.errors import InvalidArgumentError
from server.records import Turn

Message = dict[str, str]


def build_prompt(
    encode: Callable[[list[Message]], list[int]], turns: Sequence[Turn], message: str, max_prompt_tokens: int
) -> list[int]:
    """Token ids of as many whole turns as fit before `message`, the newest first to stay.

    A turn is a user message with its answer; neither is ever cut. Raises InvalidArgumentError where `message` alone
    does not fit.
    """
    history = [(turn.message, turn.answer) for turn in turns if turn.answer is not None]
    for start in range(len(history) + 1):
        messages: list[Message] = []
        for asked, answered in history[start:]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered or ""}]
        token_ids = encode([*messages, {"role": "user", "content": message}])
        if len(token_ids) <= max_prompt_tokens:
            return token_ids
    raise InvalidArgumentError(
        "message", f"The message takes {len(token_ids)} tokens; at most {max_prompt_tokens} fit beside its answer."
    )
