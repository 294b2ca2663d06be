"""A round's prompts: users' own, each always on the same side, and built-in ones if there are few."""

from collections import Counter

import pytest

from learner.reward.dataset import is_judge
from learner.round.prompts import OWN, Prompts, share_out, split_prompts, top_up
from server.shared.model.text import UnknownTokenError
from server.store.chats.records import Prompt


def encode(messages: list[dict[str, str]]) -> list[int]:
    [message] = messages
    assert message["role"] == "user"
    return list(message["content"].encode())


def test_prompts_are_split_as_votes_are_and_long_ones_left_out() -> None:
    prompts = [Prompt(f"conv_{i}", [1] * 10, 20) for i in range(40)] + [Prompt("conv_x", [1] * 100, 20)]
    found = split_prompts(prompts, 0.4, max_model_len=64)
    assert len(found.train) + len(found.held_out) == 40
    assert all(is_judge(prompt.conversation_id, 0.4) for prompt in found.held_out)
    assert not any(is_judge(prompt.conversation_id, 0.4) for prompt in found.train)


def test_prompts_with_tokens_that_the_model_lacks_are_left_out() -> None:
    prompts = [Prompt("a", [1, 39], 8), Prompt("b", [40, 1], 8)]
    found = split_prompts(prompts, 0.4, max_model_len=64, embeddings=40)
    assert [prompt.conversation_id for prompt in found.train + found.held_out] == ["a"]


def test_built_in_questions_with_tokens_that_the_model_lacks_are_left_out() -> None:
    def without_cats(messages: list[dict[str, str]]) -> list[int]:
        if "cat" in messages[0]["content"]:
            raise UnknownTokenError("cat")
        return encode(messages)

    found = top_up(Prompts([], []), 64, 0.4, 2048, without_cats)
    assert found.own == 64 - sum("cat" in question for question in OWN) == 62


def of_users(counts: dict[str, int]) -> list[Prompt]:
    return [Prompt(f"{user}{n}", [n], 8, user) for user, count in counts.items() for n in range(count)]


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        # Few users are not capped.
        ({"ann": 1000, "ben": 10}, {"ann": 1000, "ben": 10}),
        # Of twenty, none has more than two equal shares: a tenth.
        ({"ann": 1000, **{f"u{n}": 10 for n in range(19)}}, {"ann": 21, **{f"u{n}": 10 for n in range(19)}}),
        ({f"u{n}": 10 for n in range(40)}, {f"u{n}": 10 for n in range(40)}),
    ],
)
def test_no_user_dominates_the_prompts_of_a_round(counts: dict[str, int], kept: dict[str, int]) -> None:
    assert Counter(prompt.user for prompt in share_out(of_users(counts), 0.05)) == kept


def test_a_users_newest_prompts_are_kept_in_order() -> None:
    prompts = share_out(of_users({"ann": 1000, **{f"u{n}": 10 for n in range(19)}}), 0.05)
    assert [prompt.token_ids[0] for prompt in prompts if prompt.user == "ann"] == list(range(979, 1000))


def test_a_question_asked_on_two_days_is_on_one_side() -> None:
    # A template with the date: the tokens differ, and the conversations alone would be on both sides.
    asked = [Prompt(f"conv_{n}", [n, 7], 8, "ann", "conv_0") for n in range(40)]
    found = split_prompts(asked, 0.4, max_model_len=64)
    assert sorted((len(found.train), len(found.held_out))) == [0, 40]


def test_few_prompts_are_topped_up_and_no_question_is_on_both_sides() -> None:
    users = Prompts([Prompt("a", [1], 40), Prompt("b", [2], 64)], [Prompt("c", [3], 64)])
    found = top_up(users, 10, 0.4, 2048, encode)
    assert (len(found.train), len(found.held_out), found.own) == (10, 10, 17)
    assert found.train[:2] == users.train
    assert {prompt.max_tokens for prompt in found.train[2:]} == {64}
    texts = [bytes(prompt.token_ids).decode() for prompt in found.train[2:] + found.held_out[1:]]
    assert len(set(texts)) == 17
    assert set(texts) <= set(OWN)
    assert not any(is_judge(text, 0.4) for text in texts[:8])
    assert all(is_judge(text, 0.4) for text in texts[8:])


def test_a_built_in_question_that_a_user_asked_is_not_added() -> None:
    asked = Prompts([Prompt("a", encode([{"role": "user", "content": text}]), 8) for text in OWN], [])
    found = top_up(asked, 1_000, 0.4, 2048, encode)
    assert found == asked


def test_a_question_that_leaves_no_room_for_an_answer_is_left_out() -> None:
    users = Prompts([Prompt("a", [1], 64)], [Prompt("c", [3], 64)])
    found = top_up(users, 10, 0.4, 64 + 40, encode)
    assert found.own > 0
    assert max(len(prompt.token_ids) for prompt in found.train + found.held_out) <= 40


def test_enough_prompts_are_not_topped_up() -> None:
    users = Prompts([Prompt("a", [1], 40)], [Prompt("c", [3], 64)])
    assert top_up(users, 1, 0.4, 2048, encode) is users


def test_built_in_questions_are_distinct_and_fill_the_default_on_both_sides() -> None:
    assert len(set(OWN)) == len(OWN) == 64
    held_out = sum(is_judge(text, 0.4) for text in OWN)
    assert held_out >= 24
    assert len(OWN) - held_out >= 24
