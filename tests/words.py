"""A tokenizer of one token per word, `w0`, `w1` and so on, for tiny models."""

from pathlib import Path


def save_words(directory: Path, count: int, end: int) -> None:
    """Writes it beside a model. The word `end` ends an answer and pads; `w1` begins a message, `w3` an answer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{end}", pad_token=f"w{end}")
    tokenizer.chat_template = "{% for message in messages %}w1 {{ message.content }} {% endfor %}w3"
    tokenizer.save_pretrained(directory)
