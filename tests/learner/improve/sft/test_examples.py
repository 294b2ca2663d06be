"""What becomes an example to imitate, how much each counts, and which questions are held out."""

from dataclasses import replace

import pytest
import torch

from learner.improve.sft.examples import (
    Example,
    corrected,
    demonstrated,
    split,
    to_examples,
    topics,
    weigh,
)
from learner.improve_settings import SFTSettings
from learner.reward.dataset import is_judge, usable_corrections
from server.shared.model.text import UnknownTokenError
from server.store.chats.records import Correction, Demonstration, Response, Snapshot

EOS = 0


def encode_prompt(messages: list[dict[str, str]], began: float) -> list[int]:
    assert began == 7.0
    return [1, *(len(word) for message in messages for word in message["content"].split())]


def encode(text: str, ended: bool) -> list[int]:
    if "☃" in text:
        raise UnknownTokenError("☃")
    return [len(word) for word in text.split()] + [EOS] * ended


def decode(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def shown(content: str, answer: str = "as it is", user: str = "ann") -> Demonstration:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Demonstration(f"feedback_{content}", user, messages, 7.0)


def response(conversation: str = "c1", finish: str = "stop") -> Response:
    return Response(
        id=f"r_{conversation}", conversation_id=conversation, user="ann", status="finished", prompt_token_ids=[1, 5],
        token_ids=[3, 0], logprobs=[], text="old words", temperature=1.0, max_tokens=9, seed=None,
        finish_reason=finish, policy_version="v0000", create_time=0.0,  # type: ignore[arg-type]
    )  # fmt: skip


def test_only_the_last_message_of_a_demonstration_is_imitated() -> None:
    messages = [
        {"role": "user", "content": "who are you"},
        {"role": "assistant", "content": "nobody"},
        {"role": "user", "content": "really"},
        {"role": "assistant", "content": "no"},
    ]
    found = demonstrated(Demonstration("f", "ann", messages, 7.0), encode_prompt, encode)
    assert found == ([1, 3, 3, 3, 6, 6], [2, EOS])


def test_a_correction_ends_as_its_answer_did() -> None:
    correction = Correction("f", "ann", "new words", response(), 0.0)
    assert corrected(correction, encode) == ([1, 5], [3, 5, EOS])
    assert corrected(replace(correction, response=response(finish="length")), encode) == ([1, 5], [3, 5])
    [found] = to_examples([], [correction], encode_prompt, encode, decode, 8)
    assert (found.question, found.conversation) == ("1 5", "c1")


def test_what_the_model_cannot_read_is_left_out() -> None:
    told = [shown("one two"), shown("three", "a ☃"), shown("four", "so very long an answer that it does not fit")]
    corrections = [Correction("f", "ann", "", replace(response(), prompt_token_ids=[]), 0.0)]
    found = to_examples(told, corrections, encode_prompt, encode, decode, longest=8)
    assert [one.feedback_id for one in found] == ["feedback_one two"]


def test_corrections_that_judge_or_change_nothing_are_not_used() -> None:
    names = [f"c{number}" for number in range(40)]
    corrections = [Correction(name, "ann", "new words", response(name), 0.0) for name in names]
    corrections.append(Correction("same", "ann", "old words ", response("c1"), 0.0))
    found = usable_corrections(Snapshot(0, [], [], corrections, []), 0.4)
    assert [one.feedback_id for one in found] == [name for name in names if not is_judge(name, 0.4)]
    assert 15 < len(found) < 33


def examples(count: int, user: str = "ann", tokens: int = 4) -> list[Example]:
    return [
        Example(f"{user}{number}", user, f"{user}{number}", f"{user}{number}", ([1], [3] * tokens))
        for number in range(count)
    ]


def test_a_fifth_of_the_questions_is_held_out_and_at_least_two() -> None:
    for count, held_out in ((5, 2), (10, 2), (20, 4), (100, 20)):
        found = split(examples(count), set(), SFTSettings(), 1.0)
        assert (len(found.train), len(found.held_out)) == (count - held_out, held_out)
    assert not split(examples(6), set(), SFTSettings(), 1.0).too_few
    assert split(examples(5), set(), SFTSettings(), 1.0).too_few
    assert dict(split(examples(6), set(), SFTSettings(), 1.0).sides) == {
        "ann0": "train", "ann1": "judge", "ann2": "train", "ann3": "train", "ann4": "judge", "ann5": "train",
    }  # fmt: skip


def test_one_question_is_on_one_side() -> None:
    twice = [replace(one, question=f"q{number // 2}") for number, one in enumerate(examples(20))]
    found = split(twice, set(), SFTSettings(), 1.0)
    assert len(found.held_out) == 4
    assert {one.question for one in found.train.examples} & {one.question for one in found.held_out.examples} == set()
    assert len(set(found.topics)) == 2


def test_what_shares_a_question_or_a_conversation_is_one_topic() -> None:
    """A question that was corrected in two conversations joins them, and a demonstration of it belongs to both."""
    made = [
        Example(str(number), "ann", conversation, question, ([1], [2]))
        for number, (conversation, question) in enumerate(
            [("c1", "why"), ("c2", "who"), ("c1", "who"), ("d3", "why"), ("c4", "how"), ("c4", "when"), ("d5", "what")]
        )
    ]
    found = topics(made)
    assert [found.index(topic) for topic in found] == [0, 0, 0, 0, 4, 4, 6]


def test_nothing_is_held_out_that_a_version_was_trained_on() -> None:
    trained = {f"ann{number}" for number in range(17)}
    found = split(examples(20), trained, SFTSettings(), 1.0)
    assert {one.feedback_id for one in found.held_out.examples} == {"ann17", "ann18", "ann19"}
    assert split(examples(20), {f"ann{number}" for number in range(19)}, SFTSettings(), 1.0).too_few


def test_no_user_and_no_conversation_has_more_than_its_share_of_the_tokens() -> None:
    several = examples(8) + [one for name in "bcdefghij" for one in examples(1, name)]
    found = weigh(several, 1.0, 0.2)
    totals = [float(found.weights[:8].sum() * 4), *(found.weights[8:] * 4).tolist()]
    assert totals[0] / sum(totals) == pytest.approx(0.2, abs=1e-3)
    assert totals[1:] == pytest.approx([4.0] * 9)
    # Long answers count by their tokens.
    long = weigh([*examples(1, "ann", 40), *(one for name in "bcdefghij" for one in examples(1, name))], 1.0, 0.2)
    assert float(long.weights[0] * 40) == pytest.approx(9.0, abs=1e-2)
    # Corrections of one conversation.
    one_talk = [replace(one, conversation="talk") for one in examples(30)] + examples(27, "bob")
    weights = weigh(one_talk, 0.1, 1.0).weights
    assert float(weights[:30].sum() / weights.sum()) == pytest.approx(0.1, abs=1e-3)
    assert torch.equal(weights[30:], torch.ones(27))


def test_both_caps_hold_together() -> None:
    """What the users' cap takes from one with many conversations makes another's only one too large a share."""
    many = examples(20, "ann", 100)
    several = [*many, *examples(1, "bob", 200), *(one for name in "cdefghijk" for one in examples(1, name, 20))]
    weights = weigh(several, 0.1, 0.2).weights * torch.tensor([float(len(one.tokens[1])) for one in several])
    assert float(weights[:20].sum() / weights.sum()) < 0.21
    assert float(weights[20] / weights.sum()) < 0.11
