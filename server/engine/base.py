"""The interface of the serving engine, which samples answers and swaps versions. Unit tests replace `ServingEngine`."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.store.chats.records import Generation


@dataclass(frozen=True)
class Sampling:
    """How one answer is sampled. top_p is always 1 and top_k off: anything else breaks the learner's ratios."""

    temperature: float
    max_tokens: int
    seed: int | None = None
    # The answer ends before the first of these that comes.
    stop: tuple[str, ...] = ()


class SwapError(Exception):
    """The new weights were not loaded; the old ones stay in use."""


class AnswerStream(Protocol):
    """One answer as it is sampled: iterate over its text, then `finish`."""

    def __aiter__(self) -> AsyncIterator[str]: ...

    async def finish(self) -> Generation:
        """The whole answer; stops it first if it is still running. Call it once, after or instead of iterating."""
        ...

    def fail(self) -> Generation:
        """The answer so far, without asking the engine again."""
        ...

    def so_far(self) -> Generation:
        """What was given to the reader until now; it goes on."""
        ...


class ModelText(Protocol):
    """The text of a model, as token ids."""

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of a prompt and its answer together."""
        ...

    def encode(self, messages: list[dict[str, str]], began: float) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the assistant's answer. A template that
        writes the date writes that of `began`, in seconds since 1970. Any thread may call it, also while the engine is
        dead. Raises UnknownTokenError for a token that the model has no embedding for, and ValueError for messages
        that the template rejects."""
        ...

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer written by a person, including its end. Any thread may call it, too. Raises
        UnknownTokenError."""
        ...


class ServingEngine(ModelText, Protocol):
    """Samples answers from one version at a time."""

    @property
    def version(self) -> str:
        """The loaded version."""
        ...

    @property
    def live_versions(self) -> list[str]:
        """The versions that `sample` may be asked for, the loaded one first."""
        ...

    @property
    def reference(self) -> str:
        """The reference that it was started with. It can load the versions of the same model, and no others."""
        ...

    async def sample(self, prompt_token_ids: list[int], sampling: Sampling, version: str | None = None) -> AnswerStream:
        """Start an answer; waits during a swap. Raises UnavailableError for a `version` that is not live any more."""
        ...

    def locate(self, data_dir: Path, version: str) -> Path:
        """The directory that `swap` needs for a version, verified, and created if possible. Raises ManifestError."""
        ...

    async def swap(self, version: str, directory: Path) -> None:
        """Load other weights while running answers continue. Raises SwapError and keeps the old weights."""
        ...

    async def keep_live(self, version: str, directory: Path) -> None:
        """Let `sample` answer from this version, too. Raises SwapError if it cannot be loaded."""
        ...

    @property
    def alive(self) -> bool:
        """Whether answers can be sampled at all."""
        ...

    def probe(self, hang_seconds: float | None) -> str | None:
        """Kill an engine whose process or step is stuck, and return the reason; None while it is healthy.
        `hang_seconds` replaces both limits."""
        ...

    async def revive(self) -> None:
        """Restart a dead engine with the version that was loaded. Answers that were being sampled are lost."""
        ...

    async def close(self) -> None: ...
