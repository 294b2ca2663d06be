"""What another model asked and answered is read from its text, with the ids of this model's tokenizer."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from learner.round.token_ids import TokenIds
from server.store.chats.histories import OwnHistory
from server.store.chats.records import FinishReason, Generation, Place, Prompt, Response, Span
from server.store.files.manifest import new_version
from server.store.store import Store
from tests.learner.rounds import settings
from tests.words import NUMBERS

FIVE, SIX, SEVEN, EIGHT, NINE = (NUMBERS + number for number in (5, 6, 7, 8, 9))
ASK, END, ANSWER, QUESTION = 1, 2, 3, 4


@pytest.fixture
def store(tmp_path: Path, other_model: Path) -> Iterator[Store]:
    """v0000 of one model, v0001 and v0002 of another; v0001, whose tokenizer is on disk, is their reference."""
    with new_version(tmp_path / "policies" / "v0001", kind="full", reference_version="v0001") as staging:
        shutil.copytree(other_model, staging, dirs_exist_ok=True)
    store = Store.open(tmp_path)
    store.policies.register_reference()
    for version in ("v0001", "v0002"):
        store.policies.register(
            version, kind="full", state="candidate", parent_version=None, reference_version="v0001", round_id=None,
            reward_model_version=None, metrics={},
        )  # fmt: skip
    yield store
    store.close()


def token_ids(store: Store, tmp_path: Path, max_model_len: int = 100) -> TokenIds:
    return TokenIds(store, "v0001", settings(tmp_path, max_model_len=max_model_len))


def answered(
    store: Store,
    conversation: str,
    message: str,
    answer: str,
    version: str = "v0000",
    prompt: tuple[int, ...] = (30, 31),
    reason: FinishReason = "stop",
    max_tokens: int = 20,
    place: Place | None = None,
) -> Response:
    """A turn of ann, as the server stores it; its ids are of `version`'s tokenizer."""
    response = store.responses.begin(
        "ann", conversation, message=message, replica_id="here", policy_version=version, prompt_token_ids=list(prompt),
        temperature=0.85, max_tokens=max_tokens, seed=None, place=place,
    )  # fmt: skip
    store.responses.finish(response, Generation([99, 98], [-0.5, -0.5], answer, reason, [Span(0, 2, version)]))
    return store.responses.get("ann", response)


def ids(response: Response) -> tuple[list[int], list[int]]:
    return response.prompt_token_ids, response.token_ids


def test_an_answer_of_another_model_is_read_as_text(store: Store, tmp_path: Path) -> None:
    conversation = store.conversations.create("ann", "question 5")
    first = answered(store, conversation, "question 5", "6 7")
    second = answered(store, conversation, "8", "9", reason="length")
    encode = token_ids(store, tmp_path)
    assert ids(encode.response(first)) == ([ASK, QUESTION, FIVE, ANSWER], [SIX, SEVEN, END])
    # The model saw the turn before. An answer that the length limit cut does not end.
    assert ids(encode.response(second)) == ([ASK, QUESTION, FIVE, ASK, SIX, SEVEN, ASK, EIGHT, ANSWER], [NINE])
    read = encode.response(first)
    assert (read.logprobs, read.text, read.spans) == ([], "6 7", [Span(0, 2, "v0000")])


def test_a_callers_own_history_is_read_as_it_was_sent(store: Store, tmp_path: Path) -> None:
    def own(message: str, answer: str, *said: tuple[str, str]) -> Response:
        def create() -> str:
            return store.conversations.create("ann", message)

        conversation, place = store.histories.place("ann", OwnHistory("", list(said), message), 100, create)
        return answered(store, conversation, message, answer, place=place)

    # The second answer to the same message, and what was said after each of them. "5" was answered elsewhere.
    first = own("5", "6")
    second = own("5", "7")
    after_first = own("8", "9", ("5", "6"))
    after_second = own("8", "9", ("5", "7"))
    edited = own("8", "9", ("5", "9"))
    assert len({one.conversation_id for one in (first, second, after_first, after_second, edited)}) == 1
    encode = token_ids(store, tmp_path)
    assert ids(encode.response(first))[0] == ids(encode.response(second))[0] == [ASK, FIVE, ANSWER]
    assert ids(encode.response(after_second))[0] == [ASK, FIVE, ASK, SEVEN, ASK, EIGHT, ANSWER]
    assert ids(encode.response(after_first))[0] == [ASK, FIVE, ASK, SIX, ASK, EIGHT, ANSWER]
    assert ids(encode.response(edited))[0] == [ASK, FIVE, ASK, NINE, ASK, EIGHT, ANSWER]


def test_an_answer_that_a_stop_sequence_ended_has_no_end_token(store: Store, tmp_path: Path) -> None:
    conversation = store.conversations.create("ann", "question 5")
    response = answered(store, conversation, "question 5", "6 7", reason="stop_sequence")
    assert ids(token_ids(store, tmp_path).response(response))[1] == [SIX, SEVEN]


def test_the_system_prompt_of_a_conversation_is_read_too(store: Store, tmp_path: Path) -> None:
    conversation = store.conversations.create("ann", "question 5", system="8")
    first = answered(store, conversation, "question 5", "6 7")
    encode = token_ids(store, tmp_path)
    assert ids(encode.response(first)) == ([ASK, EIGHT, ASK, QUESTION, FIVE, ANSWER], [SIX, SEVEN, END])


@pytest.mark.parametrize("version", ["v0001", "v0002"])
def test_an_answer_of_the_same_model_keeps_what_was_sampled(store: Store, tmp_path: Path, version: str) -> None:
    conversation = store.conversations.create("ann", "question 5")
    sampled = answered(store, conversation, "question 5", "6 7", version)
    assert token_ids(store, tmp_path).response(sampled) is sampled


def test_the_oldest_turns_are_dropped_as_a_server_would(store: Store, tmp_path: Path) -> None:
    conversation = store.conversations.create("ann", "5")
    answered(store, conversation, "5", "6")
    last = answered(store, conversation, "7", "8")
    # ask 5 ask 6 ask 7 answer has seven tokens.
    assert token_ids(store, tmp_path, 64).response(replace(last, max_tokens=58)).prompt_token_ids == [1, SEVEN, 3]
    assert len(token_ids(store, tmp_path, 64).response(replace(last, max_tokens=57)).prompt_token_ids) == 7
    # A limit that this model cannot keep is its half.
    assert len(token_ids(store, tmp_path, 64).response(replace(last, max_tokens=64)).prompt_token_ids) == 7


def test_both_answers_of_a_comparison_and_the_turns_after_the_chosen_one(store: Store, tmp_path: Path) -> None:
    conversation = store.conversations.create("ann", "5")
    comparison, a, b = store.responses.begin_comparison(
        "ann", conversation, message="5", replica_id="r", policy_versions=("v0000", "v0000"), prompt_token_ids=[30],
        temperatures=(0.7, 1.0), max_tokens=20, seeds=(None, None),
    )  # fmt: skip
    for response, text in ((a, "6"), (b, "7")):
        store.responses.finish(response, Generation([99], [-0.5], text, "stop", [Span(0, 1, "v0000")]))
    store.feedback.submit_choice("ann", comparison, "B")
    later = answered(store, conversation, "8", "9")
    [vote] = token_ids(store, tmp_path).snapshot(store.snapshots.take()).choices
    assert (ids(vote.a), ids(vote.b)) == (([ASK, FIVE, ANSWER], [SIX, END]), ([ASK, FIVE, ANSWER], [SEVEN, END]))
    said = token_ids(store, tmp_path).response(later).prompt_token_ids
    assert said == [ASK, FIVE, ASK, SEVEN, ASK, EIGHT, ANSWER]


def test_thumbs_and_corrections_are_read_too(store: Store, tmp_path: Path) -> None:
    conversation = store.conversations.create("ann", "5")
    response = answered(store, conversation, "5", "6")
    store.feedback.submit_thumb("ann", response.id, up=True)
    store.feedback.submit_correction("ann", response.id, "7")
    read = token_ids(store, tmp_path).snapshot(store.snapshots.take())
    assert [ids(vote.response) for vote in (*read.thumbs, *read.corrections)] == [([1, FIVE, 3], [SIX, 2])] * 2


def test_what_was_deleted_or_does_not_fit_has_no_tokens(store: Store, tmp_path: Path) -> None:
    conversation = store.conversations.create("ann", "5")
    long = answered(store, conversation, " ".join(["5"] * 90), "6")
    assert ids(token_ids(store, tmp_path).response(long)) == ([], [])
    store.conversations.delete("ann", conversation)
    assert ids(token_ids(store, tmp_path, 200).response(long)) == ([], [])


def test_a_question_that_both_models_were_asked_is_one_prompt(store: Store, tmp_path: Path) -> None:
    mine = (ASK, QUESTION, FIVE, ANSWER)
    old, new, other = (store.conversations.create("ann", text) for text in ("question 5", "question 5", "question 6"))
    answered(store, old, "question 5", "7", prompt=(30, 31))
    answered(store, new, "question 5", "7", "v0001", prompt=mine)
    # By chance another text has the same ids in the other tokenizer.
    answered(store, other, "question 6", "7", "v0000", prompt=mine)
    found = token_ids(store, tmp_path).prompts(store.snapshots.prompts())
    assert [(prompt.token_ids, prompt.conversation_id, prompt.opened_by) for prompt in found] == [
        ([*mine], old, old),
        ([ASK, QUESTION, SIX, ANSWER], other, other),
    ]


def test_a_prompt_that_leaves_this_model_no_room_gets_shorter_answers(store: Store, tmp_path: Path) -> None:
    conversation = store.conversations.create("ann", "5")
    answered(store, conversation, "5", "6", max_tokens=500)
    [prompt] = token_ids(store, tmp_path).prompts(store.snapshots.prompts())
    assert (prompt.token_ids, prompt.max_tokens) == ([ASK, FIVE, ANSWER], 50)


def test_no_tokenizer_is_loaded_for_one_model_alone(store: Store, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "policies" / "v0001")
    prompt = Prompt("conv", [30, 31], 20, policy_version="v0002")
    assert token_ids(store, tmp_path).prompts([prompt]) == [prompt]
