"""The fields of a chat completion: which are served, and which values of the others change nothing.

A value that changes nothing is accepted, since many clients send it. Any other field or value is refused by its name:
a client must not believe that it had an effect. null is the same as leaving a field out. docs/gateway.md has the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clients.gateway.errors import GatewayError

SERVED = {
    "model": "`prefloop`, or `prefloop@VERSION` for a version that can answer now (`/v1/models`)",
    "messages": "roles `system`, `developer`, `user`, `assistant`; text, or parts of the type `text`",
    "n": "1 or 2; with 2 the answers are a comparison",
    "temperature": "0 to 2; the server sets both temperatures of a comparison",
    "max_tokens": "from 1 to the server's `PREFLOOP_MAX_TOKENS`, which is also the default",
    "max_completion_tokens": "the newer name of `max_tokens`",
    "stop": "a text or up to four",
    "seed": "0 or more",
    "stream": "server-sent events",
    "stream_options": "`include_usage`",
    "user": "an end user of the application whose key this is",
    "safety_identifier": "the newer name of `user`",
}


@dataclass(frozen=True)
class Neutral:
    """Values of a field that change nothing, and their description."""

    words: str
    accepts: Callable[[Any], bool]


def _number(value: float) -> Neutral:
    return Neutral(f"{value:g}", lambda given: given == value and not isinstance(given, bool))


def _one_of(*values: Any) -> Neutral:
    words = " or ".join("true" if value is True else "false" if value is False else f"`{value}`" for value in values)
    return Neutral(words, lambda given: any(given is value or (given == value != 0) for value in values))


EMPTY = Neutral("empty", lambda given: given in ([], {}, ""))
ANY = Neutral("anything", lambda given: True)

NEUTRAL = {
    "top_p": _number(1),
    "presence_penalty": _number(0),
    "frequency_penalty": _number(0),
    "top_logprobs": _number(0),
    "logprobs": _one_of(False),
    "logit_bias": EMPTY,
    "tools": EMPTY,
    "functions": EMPTY,
    "tool_choice": _one_of("none", "auto"),
    "function_call": _one_of("none", "auto"),
    "parallel_tool_calls": ANY,
    "response_format": Neutral("`text`", lambda given: given == {"type": "text"}),
    "modalities": Neutral("`text`", lambda given: given == ["text"]),
    "service_tier": _one_of("auto", "default"),
    "store": _one_of(False),
    "metadata": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_retention": ANY,
}
NEUTRAL_IN_MESSAGES = {
    "tool_calls": EMPTY,
    "annotations": EMPTY,
    "refusal": EMPTY,
}
NEUTRAL_IN_STREAM_OPTIONS = {"include_obfuscation": _one_of(False)}


def keep_served(
    given: dict[str, Any], served: set[str], neutral: dict[str, Neutral], where: str = ""
) -> dict[str, Any]:
    """The served fields that have a value. Raises GatewayError for any other that would change something; `where` is
    the path to these fields."""
    kept = {name: value for name, value in given.items() if value is not None}
    for name, value in kept.items():
        if name in served:
            continue
        param = where + name
        if name not in neutral:
            raise GatewayError(400, f"{param} is not served.", param=param, code="unsupported_parameter")
        if not neutral[name].accepts(value):
            sentence = f"{param} is served only if it changes nothing: {neutral[name].words}."
            raise GatewayError(400, sentence, param=param, code="unsupported_value")
    return {name: value for name, value in kept.items() if name in served}
