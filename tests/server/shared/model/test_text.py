"""User text is plain text for every template: encoded as by `apply_chat_template` if nothing looks like a control
token, and without control tokens otherwise."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.shared.model.text import ESCAPE, ChatText

SAID = "How do I get to the sea? <b>Quickly</b>, please.\n\n1. Walk\n2. Run   fast é € 你好 🙂 system user assistant"
LOOP = "{% for message in messages %}"
# Templates of a dozen model families: how a turn begins and ends, what is trimmed, how the date is written.
TEMPLATES = {
    "chatml": (
        "<|im_start|> <|im_end|>",
        LOOP + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "system first": (
        "<|im_start|> <|im_end|>",
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + LOOP
        + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    ),
    "headers, dated": (
        "<|begin|> <|start_header|> <|end_header|> <|eot|>",
        "<|begin|><|start_header|>system<|end_header|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}<|eot|>"
        + LOOP
        + "<|start_header|>{{ message.role }}<|end_header|>\n\n{{ message.content | trim }}<|eot|>{% endfor %}"
        "<|start_header|>assistant<|end_header|>\n\n",
    ),
    "instructions": (
        "<s> </s> [INST] [/INST]",
        "<s>" + LOOP + "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
        "{% else %} {{ message.content }}</s>{% endif %}{% endfor %}",
    ),
    "turns, trimmed": (
        "<bos> <start_of_turn> <end_of_turn>",
        "<bos>" + LOOP + "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n",
    ),
    "roles as tokens": (
        "<|system|> <|user|> <|assistant|> <|end|>",
        LOOP + "<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}<|assistant|>\n",
    ),
    "roles as tokens, written out": (
        "<|system|> <|user|> <|assistant|> </s>",
        LOOP + "{% if message.role == 'user' %}<|user|>\n{{ message.content.strip() }}</s>\n"
        "{% else %}<|assistant|>\n{{ message.content.strip() }}</s>\n{% endif %}{% endfor %}<|assistant|>\n",
    ),
    "plain words": (
        "</s>",
        LOOP + "{% if message.role == 'user' %}USER: {{ message.content }} {% else %}"
        "ASSISTANT: {{ message.content }}</s>{% endif %}{% endfor %}ASSISTANT:",
    ),
    "full width": (
        "<｜begin｜> <｜User｜> <｜Assistant｜> <｜end｜>",
        "<｜begin｜>" + LOOP + "{% if message.role == 'user' %}<｜User｜>{{ message.content }}{% else %}"
        "<｜Assistant｜>{{ message.content }}<｜end｜>{% endif %}{% endfor %}<｜Assistant｜>",
    ),
    "turn tokens": (
        "<|START_OF_TURN|> <|USER|> <|CHATBOT|> <|END_OF_TURN|>",
        LOOP + "<|START_OF_TURN|>{{ '<|USER|>' if message.role == 'user' else '<|CHATBOT|>' }}{{ message.content }}"
        "<|END_OF_TURN|>{% endfor %}<|START_OF_TURN|><|CHATBOT|>",
    ),
    "reasoning": (
        "<|im_start|> <|im_end|> +<think> +</think>",
        LOOP + "{% set content = message.content %}{% if message.role == 'assistant' and '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>{{ message.role }}\n{{ content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>\n",
    ),
    "channels": (
        "<|start|> <|message|> <|channel|> <|end|>",
        LOOP + "<|start|>{{ message.role }}<|channel|>final<|message|>{{ message.content }}<|end|>{% endfor %}"
        "<|start|>assistant",
    ),
}
# Special to the tokenizer, but not written by a template.
WORDS = ["<filename>", "<gh_stars>"]

Families = dict[str, tuple[Any, ChatText]]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([SAID] * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def spaced() -> Tokenizer:
    """A tokenizer like SentencePiece's: a text begins with a space, which is a letter; bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *(f"<0x{number:02X}>" for number in range(256))]
    tokenizer.train_from_iterator([SAID] * 4, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    return tokenizer


def made(tokenizer: Tokenizer, name: str) -> Any:
    strings, template = TEMPLATES[name]
    for string in [*strings.split(), *WORDS]:
        special = not string.startswith("+")
        tokenizer.add_tokens([AddedToken(string.removeprefix("+"), special=special, normalized=False)])
    end = strings.split()[1 if len(strings.split()) > 1 else 0]
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=AddedToken(end, special=True, normalized=False)
    )
    made.chat_template = template
    return made


@pytest.fixture(scope="module", params=[byte_level, spaced])
def families(request: pytest.FixtureRequest) -> Families:
    found = {}
    for name in TEMPLATES:
        tokenizer = made(request.param(), name)
        found[name] = (tokenizer, ChatText(tokenizer))
    return found


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


# No string that a template or tokenizer here writes itself.
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=ESCAPE), max_size=40).filter(
    lambda text: not any(mark in text for mark in "<[｜") and text.strip()
)


@settings(deadline=None)
@given(texts=st.lists(plain, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1))
def test_plain_text_is_encoded_as_transformers_does(families: Families, texts: list[str]) -> None:
    for name, (tokenizer, text) in families.items():
        expected = tokenizer.apply_chat_template(
            conversation(*texts), add_generation_prompt=True, return_dict=False,
            strftime_now=lambda form: "01 Jan 1970",
        )  # fmt: skip
        assert text.prompt(conversation(*texts), 0.0) == expected, name


def test_text_that_looks_like_a_control_token_is_plain_text(families: Families) -> None:
    for name, (tokenizer, text) in families.items():
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        control = {number for number, token in added.items() if not token.content.startswith("<0x")}

        def controls(said: str, text: ChatText = text, control: set[int] = control) -> Counter[int]:
            prompt = text.prompt(conversation(said, "Yes.", said), 0.0)
            return Counter(number for number in prompt if number in control)

        harmless = controls("Hello.")
        for string in [*(token.content for number, token in added.items() if number in control), ESCAPE]:
            assert controls(f"Hello {string}{string}.") == harmless, (name, string)
            assert not control & set(text.answer(f"Hello {string}.")[:-1]), (name, string)


def test_user_text_decodes_to_itself(families: Families) -> None:
    for name, (_, text) in families.items():
        for string in [*TEMPLATES[name][0].replace("+", "").split(), *WORDS, ESCAPE, ESCAPE + chr(0x100000)]:
            said = f"one {string} two{string}"
            assert text.text(text.answer(said)).strip() == said, (name, string)
            assert said in text.text(text.prompt(conversation(said), 0.0)), (name, string)


def test_an_answer_keeps_special_tokens_that_the_template_does_not_write(
    families: Families,
) -> None:
    for name, (tokenizer, text) in families.items():
        hello = tokenizer.encode("Hello ", add_special_tokens=False)
        ids = [*hello, tokenizer.convert_tokens_to_ids("<filename>"), tokenizer.eos_token_id]
        assert text.text(ids).strip() == "Hello <filename>", name
        stream = text.stream(text.prompt(conversation("Why?"), 0.0))
        assert "".join(stream.text([number]) for number in ids).strip() == "Hello <filename>", name


def test_a_models_reasoning_is_left_to_its_template(families: Families) -> None:
    _, text = families["reasoning"]
    answered = text.text(text.prompt(conversation("Why?", "<think>hm</think>\nSo.", "Oh?"), 0.0))
    assert "hm" not in answered
    assert "So." in answered


@pytest.mark.parametrize(("began", "date"), [(0.0, "01 Jan 1970"), (1.8e9, "15 Jan 2027")])
def test_a_template_writes_the_date_on_which_the_conversation_began(began: float, date: str) -> None:
    text = ChatText(made(byte_level(), "headers, dated"))
    assert f"Today Date: {date}" in text.text(text.prompt(conversation("Why?"), began))


def test_without_an_end_token_an_answer_just_ends() -> None:
    tokenizer = made(byte_level(), "chatml")
    tokenizer.eos_token = None
    text = ChatText(tokenizer)
    assert text.text(text.answer("So.")) == "So."
    assert len(text.answer("So.")) == len(tokenizer.encode("So.", add_special_tokens=False))


@pytest.mark.parametrize("kind", [byte_level, spaced])
def test_pieces_are_tokens_as_they_are_after_another(kind: Callable[[], Tokenizer]) -> None:
    text = ChatText(made(kind(), "chatml"))
    pieces = text.pieces()
    said = text.answer("How do I get to the sea?\n\n1. Walk", ended=False)
    assert "".join(pieces[token] for token in said).lstrip(" ") == "How do I get to the sea?\n\n1. Walk"
    # A word's piece has its space, which a tokenizer may drop from a text that begins with it.
    assert any(piece.startswith(" ") and piece.strip().isalpha() for piece in pieces)
    assert text.end_token_id is not None
    assert pieces[text.end_token_id] == "<|im_end|>"


def test_pieces_end_where_the_models_embeddings_end() -> None:
    tokenizer = made(byte_level(), "chatml")
    assert len(ChatText(tokenizer, 40).pieces()) == 40
    assert len(ChatText(tokenizer).pieces()) == len(tokenizer)


def test_ids_with_gaps_have_pieces_up_to_the_highest() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 2, "b": 5}, unk_token="a"))
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    chat.chat_template = LOOP + "{{ message.content }}{% endfor %}"
    pieces = ChatText(chat).pieces()
    assert [piece.strip() for piece in pieces] == ["a", "", "</s>", "", "", "b"]
