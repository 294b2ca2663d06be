"""Token ids to text as they come.

vLLM could do this, but asked for log-probabilities it also spells out every sampled token a second time, in the front
end's one process; with `detokenize` off it does neither (docs/decisions/0008-front-end.md has the figures).
"""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# How tokenizers begins the message of the one error that is mended by starting afresh.
INVALID_PREFIX = "Invalid prefix encountered"


class Detokenizer:
    """The text of one answer. Special tokens have none; bytes that are no whole character yet wait for the rest."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        # The prompt decides whether the first token begins with a space.
        self._stream = DecodeStream(ids=prompt_token_ids, skip_special_tokens=True)

    def text(self, token_ids: list[int]) -> str:
        """The text that these tokens add."""
        return "".join(self._step(token_id) for token_id in token_ids)

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:
            if not str(error).startswith(INVALID_PREFIX):
                raise
            # Bytes that can be no character upset the stream's state for good.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token_id) or ""
