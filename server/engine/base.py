"""What samples answers, and what a swap changes: `ServingEngine` is the boundary that unit tests replace."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.store.chats.records import Generation


@dataclass(frozen=True)
class Sampling:
    """How one answer is sampled. top_p is 1 and top_k off, always: anything else breaks the learner's ratios."""

    temperature: float
    max_tokens: int
    seed: int | None = None


class SwapError(Exception):
    """The new weights were not taken; the old ones serve on."""


class AnswerStream(Protocol):
    """One answer as it is sampled: iterate over its text, then `finish`."""

    def __aiter__(self) -> AsyncIterator[str]: ...

    async def finish(self) -> Generation:
        """All of the answer, stopped first if it is still running. Call it once, after or instead of iterating."""
        ...

    def fail(self) -> Generation:
        """What there is of the answer, without asking the engine again."""
        ...


class ServingEngine(Protocol):
    """Samples answers from one version at a time."""

    @property
    def version(self) -> str:
        """The version that is loaded."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its answer together."""
        ...

    def encode(self, messages: list[dict[str, str]], began: float) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the assistant's answer. A template that
        writes the date writes that of `began`, in seconds since 1970. Any thread may call it, an engine or none. Raises
        ValueError for messages that the template does not take."""
        ...

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer that a person wrote, its end included. Any thread may call it, too."""
        ...

    async def sample(self, prompt_token_ids: list[int], sampling: Sampling, version: str | None = None) -> AnswerStream:
        """Starts an answer; waits while a swap is under way. From another version than the loaded one only where
        several are live; raises ValueError elsewhere."""
        ...

    def locate(self, data_dir: Path, version: str) -> Path:
        """The directory that `swap` needs for a version, verified, and made where it can be. Raises ManifestError."""
        ...

    async def swap(self, version: str, directory: Path) -> None:
        """Loads other weights. Answers under way carry on. Raises SwapError and keeps the old weights."""
        ...

    async def keep_live(self, version: str, directory: Path) -> None:
        """Lets `sample` answer from this version, too. Raises SwapError where it cannot be loaded."""
        ...

    @property
    def alive(self) -> bool:
        """Whether answers can be sampled at all."""
        ...

    def probe(self, hang_seconds: float | None) -> str | None:
        """Kills an engine whose process is stopped, or whose step is stuck, and says why; None while it is well.
        `hang_seconds` replaces the limits on both."""
        ...

    async def revive(self) -> None:
        """Starts again what died, with the version that was loaded. What was being sampled is lost."""
        ...

    async def close(self) -> None: ...
