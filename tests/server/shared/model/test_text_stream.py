"""Streamed text with a tokenizer of single bytes, the hardest case for characters of several bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from server.shared.model.text import TextStream

BYTES = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=BYTES, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("aé€").ids
    assert len(ids) == 6
    stream = TextStream(tokenizer, [], frozenset({len(BYTES)}))
    assert [stream.text([token_id]) for token_id in ids] == ["a", "", "é", "", "", "€"]


def test_silent_tokens_have_no_text_and_several_tokens_come_at_once(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, tokenizer.encode("before").ids, frozenset({len(BYTES)}))
    assert stream.text([*tokenizer.encode(" ok").ids, tokenizer.token_to_id("<end>")]) == " ok"
    assert stream.text([]) == ""


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_the_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer, tokenizer.encode("prompt").ids, frozenset({len(BYTES)}))
    assert "".join(stream.text([token_id]) for token_id in tokenizer.encode(text).ids) == text


@given(token_ids=st.lists(st.integers(0, 255), max_size=40))
def test_invalid_bytes_break_nothing(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    stream = TextStream(tokenizer, [], frozenset({len(BYTES)}))
    for token_id in token_ids:
        stream.text([token_id])
    good = tokenizer.encode(" fine").ids
    assert stream.text(good).endswith("fine")
