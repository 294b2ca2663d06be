"""The policy: what samples answers, and what a swap changes.

`Policy` is the boundary that unit tests replace; `VllmPolicy` is the one that serves. It guards three things that vLLM
leaves to its caller:
- Admission. vLLM accepts requests while it is paused; here they wait outside until the swap is over.
- Labels. Every token belongs to one span of one version. vLLM labels tokens as they leave the engine; a cancelled
  answer is aborted through the engine, not by dropping its stream, because only then the last output has its spans.
- The KV cache. A swap recomputes the cache of running answers, so that no token attends to another version's keys and
  values. With `keep_kv` it does not, and every span after the swap says `stale_kv`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from server.detokenizer import Detokenizer
from server.ids import new_id
from server.records import FinishReason, Generation, Span

log = logging.getLogger(__name__)

STAGING_POLL_SECONDS = 0.02
STAGING_TIMEOUT_SECONDS = 300.0
# The engine's process ends by itself within a second or two; past this it is killed.
SHUTDOWN_SECONDS = 10.0
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled"}


@dataclass(frozen=True)
class Sampling:
    """How one answer is sampled. top_p is 1 and top_k off, always: anything else breaks the learner's ratios."""

    temperature: float
    max_tokens: int
    seed: int | None = None


class SwapError(Exception):
    """The new weights were not taken; the old ones serve on."""


class Stream(Protocol):
    """One answer as it is sampled: iterate over its text, then `finish`."""

    def __aiter__(self) -> AsyncIterator[str]: ...

    async def finish(self) -> Generation:
        """All of the answer, stopped first if it is still running. Call it once, after or instead of iterating."""
        ...

    def fail(self) -> Generation:
        """What there is of the answer, without asking the engine again."""
        ...


class Policy(Protocol):
    """Samples answers from one version at a time."""

    @property
    def version(self) -> str:
        """The version that is loaded."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its answer together."""
        ...

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the assistant's answer."""
        ...

    async def sample(self, prompt_token_ids: list[int], sampling: Sampling) -> Stream:
        """Starts an answer; waits while a swap is under way."""
        ...

    async def swap(self, version: str, directory: Path) -> None:
        """Loads other weights. Answers under way carry on. Raises SwapError and keeps the old weights."""
        ...

    async def close(self) -> None: ...


class VllmPolicy:
    """Policy over an AsyncLLM that was started with the weights in `directory`."""

    def __init__(self, engine: Any, version: str, directory: Path, *, keep_kv: bool = False) -> None:
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()
        self._backend = self._tokenizer.backend_tokenizer
        self._version = version
        self._directory = directory
        self._keep_kv = keep_kv
        self._admitted = asyncio.Event()
        self._admitted.set()
        self._swapping = asyncio.Lock()

    @property
    def version(self) -> str:
        return self._version

    @property
    def max_model_len(self) -> int:
        return int(self._engine.model_config.max_model_len)

    async def start(self) -> None:
        """Labels the first version and samples one token, so that the first user does not wait for warm-up."""
        await self._engine.update_weight_version(self._version)
        stream = await self.sample(self.encode([{"role": "user", "content": "Hello"}]), Sampling(0.0, 1))
        async for _ in stream:
            pass

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return [int(token) for token in ids]

    async def sample(self, prompt_token_ids: list[int], sampling: Sampling) -> "VllmStream":
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        await self._admitted.wait()
        request_id = new_id("req")
        queue = await self._engine.add_request(
            request_id,
            tokens_input(prompt_token_ids),
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
                logprobs=0,  # of the sampled token alone
                flat_logprobs=True,  # a list of floats, not a dictionary a token
                detokenize=False,  # server.detokenizer does
                output_kind=RequestOutputKind.DELTA,
            ),
        )
        return VllmStream(self._engine, self, request_id, queue, Detokenizer(self._backend, prompt_token_ids))

    async def swap(self, version: str, directory: Path) -> None:
        async with self._swapping:
            await self._stage(directory)
            started = time.perf_counter()
            self._admitted.clear()
            try:
                await self._engine.pause_generation(mode="keep", clear_cache=not self._keep_kv)
                try:
                    await self._apply(version, directory)
                finally:
                    await self._engine.resume_generation()
            finally:
                self._admitted.set()
            log.info("swapped to %s in %.3f s", version, time.perf_counter() - started)

    async def close(self) -> None:
        # Let go of it as well: frames and handlers may hold this object longer than the engine may live.
        engine, self._engine = self._engine, None
        await asyncio.to_thread(engine.shutdown, SHUTDOWN_SECONDS)

    def spans(self, labelled: list[Span]) -> list[Span]:
        """Marks every span but the first where a swap keeps the KV cache."""
        if not self._keep_kv:
            return labelled
        return [replace(span, stale_kv=number > 0) for number, span in enumerate(labelled)]

    async def _apply(self, version: str, directory: Path) -> None:
        # Past the pause: whatever happens here, the engine ends with one whole set of weights.
        try:
            await self._engine.collective_rpc("prefloop_apply")
            await self._engine.update_weight_version(version)
        except Exception as error:
            log.exception("%s could not be applied; going back to %s", version, self._version)
            await self._stage(self._directory)
            await self._engine.collective_rpc("prefloop_apply")
            await self._engine.update_weight_version(self._version)
            raise SwapError(f"{version} could not be applied: {error}") from error
        self._version, self._directory = version, directory

    async def _stage(self, directory: Path) -> None:
        # Read and checked in the worker's memory while answers go on, so that the pause is a copy and nothing else.
        await self._engine.collective_rpc("prefloop_stage", args=(str(directory),))
        async with asyncio.timeout(STAGING_TIMEOUT_SECONDS):
            while None in (staged := await self._engine.collective_rpc("prefloop_staged")):
                await asyncio.sleep(STAGING_POLL_SECONDS)
        if reasons := [reason for reason in staged if reason]:
            await self._engine.collective_rpc("prefloop_drop")
            raise SwapError(reasons[0])


class VllmStream:
    """One answer from an AsyncLLM. A cancelled reader loses nothing: what was sampled waits in vLLM's queue."""

    def __init__(self, engine: Any, policy: VllmPolicy, request_id: str, queue: Any, detokenizer: Detokenizer) -> None:
        self._engine = engine
        self._policy = policy
        self._request_id = request_id
        self._queue = queue
        self._detokenizer = detokenizer
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._text: list[str] = []
        self._last: Any = None

    async def __aiter__(self) -> AsyncIterator[str]:
        while self._last is None:
            # A reader that is slower than the engine gets several tokens at once: vLLM merges what waits.
            output = self._queue.get_nowait() or await self._queue.get()
            completion = output.outputs[0]
            self._token_ids.extend(completion.token_ids)
            if completion.token_ids:
                self._logprobs.extend(completion.logprobs.logprobs)
            if completion.finish_reason is not None:
                self._last = completion
            if text := self._detokenizer.text(completion.token_ids):
                self._text.append(text)
                yield text

    async def finish(self) -> Generation:
        if self._last is None:
            # Through the engine, not by closing the queue: the last output then carries the spans.
            await self._engine.abort(self._request_id)
            async for _ in self:
                pass
        self._queue.close()
        spans = [Span(span.start, span.end, span.version) for span in self._last.weight_versions or []]
        return self._generation(FINISH_REASONS.get(self._last.finish_reason, "error"), self._policy.spans(spans))

    def fail(self) -> Generation:
        """What there is of an answer whose engine died."""
        return self._generation("error", [Span(0, len(self._token_ids), self._policy.version)])

    def _generation(self, finish_reason: FinishReason, spans: list[Span]) -> Generation:
        return Generation(self._token_ids, self._logprobs, "".join(self._text), finish_reason, spans)
