"""A tokenizer of one token per word, `w0`, `w1` and so on, for tiny models; and one of other words."""

from pathlib import Path

# `save_other_words` writes the number n as this plus n.
NUMBERS = 10


def save_words(directory: Path, count: int, end: int) -> None:
    """Writes it beside a model. The word `end` ends an answer and pads; `w1` begins a message, `w3` an answer."""
    words = {f"w{number}": number for number in range(count)}
    _save(directory, words, f"w{end}", "{% for message in messages %}w1 {{ message.content }} {% endfor %}w3")


def save_other_words(directory: Path, count: int) -> None:
    """Writes one for a vocabulary of `count` tokens that knows `question` and numbers. `end`, 2, ends an answer."""
    words = {"unknown": 0, "ask": 1, "end": 2, "answer": 3, "question": 4}
    words |= {str(number): NUMBERS + number for number in range(count - NUMBERS)}
    _save(directory, words, "end", "{% for message in messages %}ask {{ message.content }} {% endfor %}answer")


def _save(directory: Path, words: dict[str, int], end: str, template: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(WordLevel(words, unk_token=min(words, key=lambda word: words[word])))
    model.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=end, pad_token=end)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
