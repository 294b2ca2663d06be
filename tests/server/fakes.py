"""A serving engine without a model: it answers word by word, at any speed, and can be held at any word."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from server.engine.base import Sampling, SwapError
from server.engine.weights import engine_weights
from server.store.chats.records import FinishReason, Generation, Span


class EngineDeadError(Exception):
    """Has the name of vLLM's error, by which the RPC edge recognises it."""


class FakeStream:
    def __init__(self, engine: "FakeEngine", words: list[str], sampling: Sampling, pinned: str | None) -> None:
        self._engine = engine
        self._pinned = pinned
        # A stop sequence is a word here.
        stop = next((number for number, word in enumerate(words) if word in sampling.stop), None)
        self._stopped = stop is not None and stop < sampling.max_tokens
        self.words = words[: sampling.max_tokens if stop is None else min(stop, sampling.max_tokens)]
        self.ended = False
        self._cut = len(words) > sampling.max_tokens
        self.said: list[str] = []
        self._versions: list[str] = []

    async def __aiter__(self) -> AsyncIterator[str]:
        while len(self.said) < len(self.words):
            if len(self.said) == self._engine.hold_after:
                self._engine.held += 1
                self._engine.holding.set()
                await self._engine.go_on.wait()
            if self._engine.pause:
                await asyncio.sleep(self._engine.pause)
            if self._engine.dies:
                raise EngineDeadError
            self.said.append(self.words[len(self.said)])
            self._versions.append(self._pinned or self._engine.version)
            yield self.said[-1] + " "

    async def finish(self) -> Generation:
        self.ended = True
        self._engine.finished += 1
        if self._engine.dies:
            raise EngineDeadError
        done = len(self.said) == len(self.words)
        whole: FinishReason = "stop_sequence" if self._stopped else "length" if self._cut else "stop"
        return self._generation(whole if done else "cancelled")

    def fail(self) -> Generation:
        return self._generation("error")

    def so_far(self) -> Generation:
        return self._generation("error")

    def _generation(self, reason: FinishReason) -> Generation:
        spans: list[Span] = []
        for index, version in enumerate(self._versions):
            if spans and spans[-1].policy_version == version:
                spans[-1] = Span(spans[-1].start, index + 1, version)
            else:
                spans.append(Span(index, index + 1, version))
        text = "".join(word + " " for word in self.said)
        return Generation(list(range(len(self.said))), [-0.5] * len(self.said), text, reason, spans)


class FakeEngine:
    """Says the next of `answers`, and `answer` when there are none left. `bad` versions fail to load."""

    def __init__(self) -> None:
        self.version = self.reference = "v0000"
        self.max_model_len = 40
        self.answer = "one two three four"
        self.answers: list[str] = []
        self.hold_after: int | None = None
        # Before each word, in seconds.
        self.pause = 0.0
        self.holding = asyncio.Event()
        self.held = 0
        self.go_on = asyncio.Event()
        self.dies = False
        self.hangs = False
        self.may_revive = asyncio.Event()
        self.may_swap = asyncio.Event()
        self.may_swap.set()
        self.swaps = 0
        self.bad: set[str] = set()
        # Streams on which `finish` was called: once for each that was sampled, or the engine continues for nobody.
        self.finished = 0
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.pinned: list[str | None] = []
        self.streams: list[FakeStream] = []
        self.live: set[str] = set()
        self.encoded: list[list[dict[str, str]]] = []

    def encode(self, messages: list[dict[str, str]], began: float) -> list[int]:
        """One token per word."""
        self.encoded.append(messages)
        return [len(word) for message in messages for word in message["content"].split()]

    def encode_answer(self, text: str) -> list[int]:
        """One token per word, and an end token."""
        return [*(len(word) for word in text.split()), 0]

    def locate(self, data_dir: Path, version: str) -> Path:
        return engine_weights(data_dir, version, "float32")

    async def keep_live(self, version: str, directory: Path) -> None:
        self.live.add(version)

    async def sample(self, prompt_token_ids: list[int], sampling: Sampling, version: str | None = None) -> FakeStream:
        self.prompts.append(prompt_token_ids)
        self.samplings.append(sampling)
        self.pinned.append(version)
        answer = self.answers.pop(0) if self.answers else self.answer
        self.streams.append(FakeStream(self, answer.split(), sampling, version))
        return self.streams[-1]

    @property
    def live_versions(self) -> list[str]:
        return [self.version, *sorted(self.live - {self.version})]

    async def swap(self, version: str, directory: Path) -> None:
        self.swaps += 1
        await self.may_swap.wait()
        if version in self.bad:
            raise SwapError(f"{version}: a tensor is not finite")
        self.version = version

    @property
    def alive(self) -> bool:
        return not self.dies

    def probe(self, hang_seconds: float | None) -> str | None:
        if self.hangs:
            self.hangs, self.dies = False, True
            return "the engine has not finished a step for 30 s"
        return None

    async def revive(self) -> None:
        await self.may_revive.wait()
        self.dies = False

    async def close(self) -> None: ...
