"""The model's prompt: the conversation so far in its chat template, trimmed from the oldest turn to fit."""

from collections.abc import Callable, Sequence

from server.shared.errors import InvalidArgumentError
from server.shared.model.text import UnknownTokenError

Message = dict[str, str]
# The reason of an InvalidArgumentError.
PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
# Programs that shorten a history by themselves know an error by these words.
TOO_LONG = "is longer than the model's context length"
# A user's message and its answer. The message is empty where a caller's own history begins with an answer.
Said = tuple[str, str]


def with_system(messages: list[Message], system: str) -> list[Message]:
    """The messages after a system prompt, unless it is empty or they have one."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def to_messages(history: Sequence[Said], message: str, system: str = "") -> list[Message]:
    """The messages of `history`, oldest first, after the system prompt if there is one, and then `message`, the
    user's."""
    messages: list[Message] = []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}] if asked else []
        messages.append({"role": "assistant", "content": answered})
    return with_system([*messages, {"role": "user", "content": message}], system)


def whole_prompt(
    encode: Callable[[list[Message]], list[int]], messages: list[Message], max_prompt_tokens: int, max_chars: int
) -> list[int]:
    """Token ids of a caller's own messages, all of them. Raises InvalidArgumentError if they do not fit, have a token
    that the model lacks, or if the model's template does not take them. Never encodes more than `max_chars`."""
    chars = sum(len(message["content"]) for message in messages)
    if chars > max_chars:
        sentence = f"A prompt of {chars} characters {TOO_LONG}; at most {max_prompt_tokens} tokens fit with an answer."
        raise InvalidArgumentError("messages", sentence, PROMPT_TOO_LONG)
    try:
        prompt = encode(messages)
    except UnknownTokenError as error:
        raise InvalidArgumentError("messages", f"The messages have {error}") from error
    except ValueError as error:
        raise InvalidArgumentError("messages", f"This model takes no such messages: {error}") from error
    if len(prompt) > max_prompt_tokens:
        sentence = f"A prompt of {len(prompt)} tokens {TOO_LONG}; at most {max_prompt_tokens} fit with an answer."
        raise InvalidArgumentError("messages", sentence, PROMPT_TOO_LONG)
    return prompt


def build_prompt(
    encode: Callable[[list[Message]], list[int]],
    history: Sequence[Said],
    message: str,
    max_prompt_tokens: int,
    system: str = "",
) -> list[int]:
    """Token ids of `message` after the system prompt and as many of the newest turns of `history` as fit.

    A turn is a user message with its answer; neither is ever cut, nor is the system prompt. Raises InvalidArgumentError
    if `message` with the system prompt does not fit, or has a token that the model lacks, or if the model takes no
    system prompt. A turn with such a token does not fit. Never encodes much more than fits, however long the
    conversation is.
    """

    def encoded(kept: int) -> list[int]:
        return encode(to_messages(history[len(history) - kept :], message, system))

    def fitting(kept: int) -> list[int] | None:
        try:
            found = encoded(kept)
        except UnknownTokenError:
            return None
        return found if len(found) <= max_prompt_tokens else None

    try:
        prompt = encoded(0)
    except UnknownTokenError as error:
        raise InvalidArgumentError("message", f"The message has {error}") from error
    except ValueError as error:
        if not system:
            raise
        raise InvalidArgumentError("system", f"This model takes no such system prompt: {error}") from error
    if len(prompt) > max_prompt_tokens:
        what = "The message and the system prompt have" if system else "The message has"
        raise InvalidArgumentError(
            "message",
            f"{what} {len(prompt)} tokens; at most {max_prompt_tokens} fit with its answer.",
            PROMPT_TOO_LONG,
        )
    # Double the number of added turns until they do not fit, then bisect.
    fits, too_many, step = 0, len(history) + 1, 1
    while too_many - fits > 1:
        kept = min(fits + step, too_many - 1)
        if (longer := fitting(kept)) is not None:
            prompt, fits, step = longer, kept, 2 * step
        else:
            too_many, step = kept, max((kept - fits) // 2, 1)
    return prompt
