"""Prompts have as many whole turns as fit, found without encoding much more."""

import pytest

from server.shared.errors import InvalidArgumentError
from server.shared.model.prompt import Said, build_prompt, with_system
from server.shared.model.text import UnknownTokenError

encoded: list[int] = []


def encode(messages: list[dict[str, str]]) -> list[int]:
    """One token per character."""
    ids = [ord(character) for message in messages for character in message["content"]]
    encoded.append(len(ids))
    return ids


def conversation(turns: int) -> list[Said]:
    """Turn n asks and answers one character each: the n-th of the alphabet and its capital."""
    return [(chr(ord("a") + number % 26), chr(ord("A") + number % 26)) for number in range(turns)]


@pytest.mark.parametrize(
    ("turns", "limit", "prompt"),
    [
        (0, 1, "!"),
        (3, 100, "aAbBcC!"),
        (3, 6, "bBcC!"),
        (3, 7, "aAbBcC!"),
        (3, 2, "!"),
        (9, 9, "fFgGhHiI!"),
        (9, 13, "dDeEfFgGhHiI!"),
    ],
)
def test_the_newest_turns_that_fit_are_kept_whole(turns: int, limit: int, prompt: str) -> None:
    assert "".join(map(chr, build_prompt(encode, conversation(turns), "!", limit))) == prompt


def test_encoding_a_long_conversation_costs_little_more_than_what_fits() -> None:
    encoded.clear()
    assert len(build_prompt(encode, conversation(1000), "!", 100)) == 99
    assert len(encoded) < 14
    assert max(encoded) < 200


def test_a_message_that_cannot_fit_is_refused_with_its_length() -> None:
    with pytest.raises(InvalidArgumentError, match="has 3 tokens; at most 2 fit"):
        build_prompt(encode, conversation(1), "abc", 2)


def lacking(messages: list[dict[str, str]]) -> list[int]:
    if any("?" in message["content"] for message in messages):
        raise UnknownTokenError("?")
    return encode(messages)


def test_a_message_with_a_token_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        build_prompt(lacking, conversation(3), "what?", 100)
    assert str(refused.value) == "The message has the token '?', for which this model has no embedding."
    assert refused.value.field == "message"


def test_turns_before_one_with_a_token_that_the_model_lacks_are_left_out() -> None:
    turns = [*conversation(3), ("d", "?"), *conversation(2)]
    assert "".join(map(chr, build_prompt(lacking, turns, "!", 100))) == "aAbB!"


def test_the_system_prompt_is_never_cut() -> None:
    def shown(limit: int) -> str:
        return "".join(map(chr, build_prompt(encode, conversation(3), "!", limit, "be ")))

    assert (shown(100), shown(8), shown(4)) == ("be aAbBcC!", "be bBcC!", "be !")
    with pytest.raises(InvalidArgumentError, match="The message and the system prompt have 4 tokens; at most 3 fit"):
        shown(3)


def test_a_model_that_takes_no_system_prompt_says_so() -> None:
    def users_only(messages: list[dict[str, str]]) -> list[int]:
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        return encode(messages)

    assert build_prompt(users_only, [], "!", 9) == [ord("!")]
    with pytest.raises(InvalidArgumentError) as refused:
        build_prompt(users_only, [], "!", 9, "be")
    assert (refused.value.field, str(refused.value)) == (
        "system", "This model takes no such system prompt: System role not supported",
    )  # fmt: skip


def test_messages_that_have_a_system_prompt_keep_it() -> None:
    user, own = {"role": "user", "content": "a"}, {"role": "system", "content": "mine"}
    assert with_system([user], "be") == [{"role": "system", "content": "be"}, user]
    assert with_system([user], "") == [user]
    assert with_system([own, user], "be") == [own, user]
