"""One answer from vLLM, as text, token ids and log-probabilities, however it ends."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from server.shared.model.stopping import StoppingText
from server.shared.model.text import TextStream
from server.store.chats.records import FinishReason, Generation, Span

FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled"}


@dataclass(frozen=True)
class Labels:
    """Which version sampled which token: `loaded` returns the current version, `settle` corrects vLLM's own spans."""

    loaded: Callable[[], str]
    settle: Callable[[list[Span]], list[Span]]


class VllmAnswerStream:
    """One answer from an AsyncLLM. A cancelled reader loses nothing: sampled tokens wait in vLLM's queue."""

    def __init__(
        self,
        engine: Any,
        request_id: str,
        queue: Any,
        text: TextStream,
        labels: "Labels",
        stop: Sequence[str] = (),
    ) -> None:
        self._engine = engine
        self._labels = labels
        # (token, version): the version that was loaded when tokens from this one on arrived here.
        self._arrived: list[tuple[int, str]] = []
        self._request_id = request_id
        self._queue = queue
        self._decoded = StoppingText(text, stop)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._text: list[str] = []
        self._last: Any = None
        self._died = False
        self._stopping = False

    async def __aiter__(self) -> AsyncIterator[str]:
        while self._last is None:
            # A reader slower than the engine gets several tokens at once: vLLM merges waiting outputs.
            try:
                output = self._queue.get_nowait() or await self._queue.get()
            except Exception:
                self._died = True
                raise
            completion = output.outputs[0]
            version = self._labels.loaded()
            if not self._arrived or self._arrived[-1][1] != version:
                self._arrived.append((len(self._token_ids), version))
            self._token_ids.extend(completion.token_ids)
            if completion.token_ids:
                self._logprobs.extend(completion.logprobs.logprobs)
            if completion.finish_reason is not None:
                self._last = completion
            text = self._decoded.text(completion.token_ids)
            if self._last is not None:
                text += self._decoded.rest()
            if text:
                self._text.append(text)
                yield text
            if self._decoded.stopped and self._last is None and not self._stopping:
                # What comes until the engine has heard of it is left out.
                self._stopping = True
                await self._engine.abort(self._request_id)

    async def finish(self) -> Generation:
        if self._died:
            # After an abort, vLLM would report a dead engine's answer as cancelled by its caller.
            return self.fail()
        if self._last is None:
            # Through the engine, not by closing the queue: the last output then carries the spans.
            await self._engine.abort(self._request_id)
            async for _ in self:
                pass
        self._queue.close()
        spans = [Span(span.start, span.end, span.version) for span in self._last.weight_versions or []]
        return self._generation(FINISH_REASONS.get(self._last.finish_reason, "error"), self._labels.settle(spans))

    def fail(self) -> Generation:
        """The answer so far of a dead engine, labelled with the versions loaded when its tokens arrived here."""
        self._text.append(self._decoded.rest())
        return self._generation("error", self._labels.settle(to_spans(self._arrived, len(self._token_ids))))

    def so_far(self) -> Generation:
        found = self._generation("error", to_spans(self._arrived, len(self._token_ids)))
        # The lists grow while this is stored.
        return replace(found, token_ids=[*found.token_ids], logprobs=[*found.logprobs])

    def _generation(self, finish_reason: FinishReason, spans: list[Span]) -> Generation:
        text = "".join(self._text)
        if not self._decoded.stopped:
            return Generation(self._token_ids, self._logprobs, text, finish_reason, spans)
        count = self._decoded.token_count
        kept = [replace(span, end=min(span.end, count)) for span in spans if span.start < count]
        return Generation(self._token_ids[:count], self._logprobs[:count], text, "stop_sequence", kept)


def mark_stale(labelled: list[Span]) -> list[Span]:
    """The spans of an answer whose KV cache was kept over swaps: all but the first attended to another version's."""
    return [replace(span, stale_kv=number > 0) for number, span in enumerate(labelled)]


def to_spans(changes: list[tuple[int, str]], end: int) -> list[Span]:
    """Spans up to token `end`, from pairs of a version's first token and the version; empty spans are left out."""
    return [
        Span(start, stop, version) for (start, version), (stop, _) in pairwise([*changes, (end, "")]) if start < stop
    ]
