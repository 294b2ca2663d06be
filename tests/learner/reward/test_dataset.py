"""Rows of the store to votes: who judges, what is left out, what a correction means."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.reward.dataset import is_judge, select, some_conversations, to_dataset
from learner.reward.likelihood import BOTH_BAD, TIE, A, B
from learner.settings import RewardSettings
from server.shared.model.text import UnknownTokenError
from server.store.chats.records import ChoiceVote, Correction, Response, Snapshot, ThumbVote

NOW = 1_000_000.0


def response(name: str, conversation: str, tokens: list[int], temperature: float = 0.85) -> Response:
    return Response(
        id=name,
        conversation_id=conversation,
        user="ann",
        status="finished",
        prompt_token_ids=[1, 2],
        token_ids=tokens,
        logprobs=[0.0] * len(tokens),
        text="text",
        temperature=temperature,
        max_tokens=64,
        seed=None,
        finish_reason="stop",
        policy_version="v0000",
        create_time=NOW,
    )


def choice(conversation: str, value: Any, tokens_a: list[int] = [3], user: str = "ann") -> ChoiceVote:  # noqa: B006
    a, b = (
        response(f"{conversation}a", conversation, tokens_a, 1.0),
        response(f"{conversation}b", conversation, [4, 5], 0.7),
    )
    return ChoiceVote(f"fb-{conversation}", user, value, f"cmp-{conversation}", a, b, NOW)


def encode(text: str, ended: bool) -> list[int]:
    if "<late>" in text:
        raise UnknownTokenError("<late>")
    return [7, 8, 2] if ended else [7, 8]


def dataset(choices: list[ChoiceVote] = [], thumbs: list[ThumbVote] = [], corrections: list[Correction] = []) -> Any:  # noqa: B006
    snapshot = Snapshot(1, choices, thumbs, corrections, [])
    return to_dataset(snapshot, NOW, 0.4, RewardSettings(), encode, embeddings=40)


def test_choices_become_indices_outcomes_and_temperature_differences() -> None:
    found = dataset([choice("c1", "A"), choice("c2", "B"), choice("c3", "TIE"), choice("c4", "BOTH_BAD")])
    assert found.votes.outcome.tolist() == [A, B, TIE, BOTH_BAD]
    assert found.answers[int(found.votes.a[0])] == ([1, 2], [3])
    assert found.answers[int(found.votes.b[0])] == ([1, 2], [4, 5])
    assert found.votes.temperature_difference.tolist() == pytest.approx([0.3] * 4)
    assert len(found.votes) == 4


def test_a_thumb_on_a_compared_answer_shares_its_row_and_conversation() -> None:
    vote = choice("c1", "A")
    found = dataset([vote], [ThumbVote("fb", "bob", -1, vote.a, NOW)])
    assert found.votes.response.tolist() == found.votes.a.tolist()
    assert found.votes.thumb_group.tolist() == found.votes.choice_group.tolist()
    assert found.votes.thumb.tolist() == [-1.0]
    assert found.votes.users == 2


def test_a_correction_beats_the_original() -> None:
    found = dataset(corrections=[Correction("fb", "ann", "better", response("r", "c1", [3]), NOW)])
    assert found.answers[int(found.votes.a[0])] == ([1, 2], [7, 8, 2])
    assert found.answers[int(found.votes.b[0])] == ([1, 2], [3])
    assert found.votes.outcome.tolist() == [A]
    assert found.votes.temperature_difference.tolist() == [0.0]


def test_a_correction_ends_only_if_the_original_did() -> None:
    cut = replace(response("r", "c1", [3]), finish_reason="length")
    found = dataset(corrections=[Correction("fb", "ann", "better", cut, NOW)])
    assert found.answers[int(found.votes.a[0])] == ([1, 2], [7, 8])


def test_a_correction_that_changes_nothing_is_left_out() -> None:
    found = dataset(corrections=[Correction("fb", "ann", " text\n", response("r", "c1", [3]), NOW)])
    assert (len(found.votes), found.left_out) == (0, 1)


def test_corrections_only_train_and_are_not_shown_answers() -> None:
    votes = [choice(f"conv_{i}", "A") for i in range(8)]
    corrections = [Correction(f"fix_{i}", "ann", "better", vote.a, NOW) for i, vote in enumerate(votes)]
    found = dataset(
        votes, corrections=[*corrections, Correction("fix", "ann", "better", response("r", "conv_20", [3]), NOW)]
    )
    # PINNED says which conversations judge; conv_20 trains.
    assert (len(found.train), len(found.judge), found.left_out) == (9, 4, 0)
    assert [side for name, side in found.sides if name.startswith("fix")] == ["train"] * 5
    shown, conversations = found.shown
    assert (len(shown), shown.groups, conversations) == (8, 8, [f"conv_{i}" for i in range(8)])


def test_tokens_that_the_model_has_no_embedding_for_are_left_out_with_their_votes() -> None:
    kept, late = response("r1", "c1", [3]), response("r2", "c2", [39, 40])
    found = dataset(
        [choice("c3", "A", tokens_a=[40]), choice("c4", "A", tokens_a=[39])],
        [ThumbVote("fb1", "ann", 1, late, NOW)],
        [Correction("fb2", "ann", "a <late> one", kept, NOW), Correction("fb3", "ann", "better", kept, NOW)],
    )
    assert (found.feedback_ids, found.left_out) == (["fb-c4", "fb3"], 3)


def test_an_answer_without_tokens_is_left_out_with_its_votes() -> None:
    assert len(dataset([choice("c1", "A", tokens_a=[])]).votes) == 0


# Another hash would move conversations that already judged into training.
PINNED = [False, True, False, True, False, True, True, False]


def test_a_conversation_stays_on_one_side() -> None:
    sides = [is_judge(f"conv_{i}", 0.4) for i in range(2000)]
    assert 0.37 < sum(sides) / 2000 < 0.43
    assert [is_judge(f"conv_{i}", 0.4) for i in range(8)] == PINNED
    assert not is_judge("conv_0", 0.0)
    assert is_judge("conv_0", 1.0)


def test_some_conversations_are_whole_ones() -> None:
    votes = [choice(f"conv_{i}", "A") for i in range(40)]
    found = dataset(votes, [ThumbVote(f"t{i}", "bob", 1, vote.a, NOW) for i, vote in enumerate(votes)]).votes
    some = select(found, some_conversations(found, 20, torch.Generator().manual_seed(0)))
    assert (len(some.a), len(some.thumb), some.groups) == (10, 10, 10)
    assert sorted(some.choice_group.tolist()) == sorted(some.thumb_group.tolist()) == list(range(10))
    assert some_conversations(found, 80, torch.Generator()).tolist() == [True] * 40


def test_train_and_judge_share_nothing_and_lose_nothing() -> None:
    votes = [choice(f"conv_{i}", "A") for i in range(40)]
    found = dataset(votes, [ThumbVote(f"t{i}", "bob", 1, vote.a, NOW) for i, vote in enumerate(votes)])
    train, judge = found.train, found.judge
    assert len(train) + len(judge) == 80
    assert not set(train.a.tolist()) & set(judge.a.tolist())
    assert sorted(set(judge.choice_group.tolist())) == list(range(judge.groups))
    assert judge.choice_group.tolist() == judge.thumb_group.tolist()
    assert len(select(found.votes, found.judges | ~found.judges)) == 80
