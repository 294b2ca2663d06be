"""Text to token ids and back, the same for server and learner. Users' text never becomes control tokens.

A chat template writes control tokens, such as the end of a turn, as strings, and a tokenizer turns every such string
into the token, also in users' text. So in users' text these strings are replaced by escapes before the template sees
them. Escapes are tokens of a second, otherwise identical tokenizer; their ids are then replaced by the ids of the
string's plain characters. Text without such strings is encoded as by `apply_chat_template`, token for token, and a
template may trim or move it as it likes.

In an answer, tokens that the template itself writes have no text; other tokens that a tokenizer calls special, such as
`<filename>`, are text.
"""

import json
import re
import sys
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream

from server.shared.model.load import load_config, load_tokenizer

Message = dict[str, str]

# The first character of escapes, the last code point for private use; in users' text it is escaped itself.
ESCAPE = "\U0010fffd"
# The second character is this plus the number of the string.
NUMBER = 0x100000
# A message that every model can be asked.
PLAIN = "Why is the sky blue, and the sea? Tell me, in few words."
# The beginning of the message of the one tokenizers error that a new stream recovers from.
INVALID_PREFIX = "Invalid prefix encountered"


class UnknownTokenError(ValueError):
    """A text has a token that the model has no embedding for. The message is the end of a sentence."""

    def __init__(self, token: str | None) -> None:
        super().__init__(f"the token {token!r}, for which this model has no embedding.")
        self.token = token


class ChatText:
    """The text of one model: `tokenizer` is transformers', with a chat template. The model has `embeddings`, one per
    token id from 0; a tokenizer may have more tokens."""

    def __init__(self, tokenizer: Any, embeddings: int = sys.maxsize) -> None:
        self._tokenizer = tokenizer
        self.embeddings = embeddings
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        template = str(tokenizer.chat_template)
        added = self._backend.get_added_tokens_decoder()
        ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        written = {number for number, token in added.items() if token.content.strip() and token.content in template}
        # Tokens without text in an answer.
        self._silent = frozenset({number for number in ends if number is not None} | written)
        special = {token.content for token in added.values() if token.special}
        self._strings = [ESCAPE, *sorted(special | {added[number].content for number in written})]
        # A model's own answers may hold what its template looks for, such as the end of its reasoning.
        self._escaped = {
            role: re.compile("|".join(re.escape(text) for text in sorted(strings, key=len, reverse=True)))
            for role, strings in (("user", {ESCAPE, *self._strings}), ("assistant", {ESCAPE, *special}))
        }

    @classmethod
    def load(cls, directory: Path, trust_remote_code: bool = False) -> "ChatText":
        """Load the tokenizer of the model in the directory."""
        tokenizer = load_tokenizer(directory, trust_remote_code)
        return cls(tokenizer, embeddings(load_config(directory, trust_remote_code)))

    def prompt(self, messages: list[Message], began: float) -> list[int]:
        """Token ids of a conversation in the chat template, ready for the answer. A template that writes the date
        writes that of `began`, in seconds since 1970. Raises UnknownTokenError, and ValueError for messages that the
        template rejects."""
        today = datetime.fromtimestamp(began, UTC)
        escaped = [{**message, "content": self._escape(message)} for message in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                escaped, add_generation_prompt=True, tokenize=False, strftime_now=today.strftime
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error
        return self._encode(rendered)

    def answer(self, text: str, ended: bool = True) -> list[int]:
        """Token ids of an answer written by a person, with the end token if it `ended` and the model has one. Raises
        UnknownTokenError."""
        end = self.end_token_id if ended else None
        return [*self._encode(self._escape({"role": "user", "content": text})), *([] if end is None else [end])]

    def text(self, token_ids: list[int]) -> str:
        """The visible text of an answer."""
        kept = [number for number in token_ids if number not in self._silent]
        return str(self._backend.decode(kept, skip_special_tokens=False))

    def pieces(self) -> list[str]:
        """The text of each token id, as it is after another token: a tokenizer may drop the space of a first word."""
        before = _ids(self._backend, "a")
        start = len(self._backend.decode(before, skip_special_tokens=False))
        # Ids may have gaps, so there are not as many as tokens.
        count = min(self.embeddings, 1 + max(self._backend.get_vocab().values()))
        after = self._backend.decode_batch([[*before, number] for number in range(count)], skip_special_tokens=False)
        return [text[start:] for text in after]

    @property
    def end_token_id(self) -> int | None:
        """The token that ends an answer, if the model has one."""
        return self._tokenizer.eos_token_id  # type: ignore[no-any-return]

    def stream(self, prompt_token_ids: list[int]) -> "TextStream":
        """A decoder of an answer to the prompt, token by token."""
        return TextStream(self._backend, prompt_token_ids, self._silent)

    def _escape(self, message: Message) -> str:
        strings = self._escaped["assistant" if message["role"] == "assistant" else "user"]
        return strings.sub(lambda found: self._escapes[found[0]], message["content"])

    def _encode(self, text: str) -> list[int]:
        ids = _ids(self._backend if ESCAPE not in text else self._escaping, text)
        if ESCAPE in text:
            ids = [plain for number in ids for plain in self._plain.get(number, (number,))]
        if (largest := max(ids, default=0)) >= self.embeddings:
            raise UnknownTokenError(self._backend.id_to_token(largest))
        return ids

    @cached_property
    def _escapes(self) -> dict[str, str]:
        return {text: ESCAPE + chr(NUMBER + number) for number, text in enumerate(self._strings)}

    @cached_property
    def _escaping(self) -> Tokenizer:
        """The second tokenizer, with a token for each escape."""
        tokenizer = Tokenizer.from_str(self._backend.to_str())
        tokenizer.add_tokens([AddedToken(escape, special=False, normalized=False) for escape in self._escapes.values()])
        return tokenizer

    @cached_property
    def _plain(self) -> dict[int, tuple[int, ...]]:
        """Map an escape's id to the ids of its string's characters."""
        description = json.loads(self._backend.to_str())
        tokenizer = Tokenizer.from_str(json.dumps({**description, "added_tokens": [], "post_processor": None}))

        # Some tokenizers put a space before a text, but not after another character.
        before = _ids(tokenizer, "a")
        found = {}
        for text, escape in self._escapes.items():
            after = _ids(tokenizer, "a" + text)
            plain = after[len(before) :] if after[: len(before)] == before else _ids(tokenizer, text)
            number = self._escaping.token_to_id(escape)
            assert number is not None
            found[number] = tuple(one for one in plain if one not in self._silent)
        return found


def embeddings(config: Any) -> int:
    """How many embeddings a model has, by its transformers configuration; no limit if that does not say."""
    return int(getattr(config.get_text_config(), "vocab_size", None) or sys.maxsize)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # Encode a batch of one: for a single text tokenizers holds the GIL, and every other thread waits.
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


class TextStream:
    """Decodes one answer token by token. Bytes of an incomplete character wait for the rest."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], silent: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._silent = silent
        # The prompt decides whether the first token begins with a space.
        self._stream = DecodeStream(ids=prompt_token_ids, skip_special_tokens=False)

    def text(self, token_ids: list[int]) -> str:
        """The text that these tokens add."""
        return "".join(self._step(token_id) for token_id in token_ids if token_id not in self._silent)

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:
            if not str(error).startswith(INVALID_PREFIX):
                raise
            # Invalid bytes break the stream's state permanently, so start a new one.
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(self._tokenizer, token_id) or ""
