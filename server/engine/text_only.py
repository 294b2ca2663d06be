"""The text of a model without its weights, for a server without an engine."""

from pathlib import Path

from server.shared.model.context import context_length
from server.shared.model.text import ChatText


class TextOnly:
    """Counts the tokens of corrections and demonstrations as an engine with the model in `directory` would; at most
    `max_model_len` fit."""

    def __init__(self, directory: Path, max_model_len: int, trust_remote_code: bool) -> None:
        self._text = ChatText.load(directory, trust_remote_code)
        self._max_model_len = context_length(directory, max_model_len, trust_remote_code)

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def encode(self, messages: list[dict[str, str]], began: float) -> list[int]:
        return self._text.prompt(messages, began)

    def encode_answer(self, text: str) -> list[int]:
        return self._text.answer(text)
