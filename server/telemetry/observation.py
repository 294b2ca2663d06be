"""Observes each call with a metric, a span, a line in the log, and an id that links the three to the caller.

They have an RPC's name, its status and its duration, and nothing that a user wrote.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from server.store.chats.records import Generation
from server.telemetry.metrics import CALL_SECONDS, CALLS, FIRST_TOKEN_SECONDS, TOKEN_SECONDS, TOKENS

log = logging.getLogger(__name__)

# Set by a caller or created here; returned in the same metadata and in the details of an error.
CALL_ID = "x-request-id"
SOUND = re.compile(r"[\w.:-]{1,64}", re.ASCII)
# Statuses that count as server errors in OpenTelemetry's conventions for RPCs.
SERVER_ERRORS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}

_call_id: ContextVar[str] = ContextVar("call_id", default="")
_tracer = trace.get_tracer("prefloop.server")


@dataclass
class Observation:
    """One call; `code` is its final status."""

    call_id: str
    code: str = "OK"


@contextmanager
def observed(method: str, metadata: dict[str, Any]) -> Iterator[Observation]:
    """Record how the call of `method` ("/package.Service/Method") inside the block ended."""
    given = metadata.get(CALL_ID)
    # The id is no secret, so it does not need the system's random bits.
    seen = Observation(given if given and SOUND.fullmatch(str(given)) else f"call_{random.getrandbits(64):016x}")
    rpc, started = method.rpartition("/")[2], time.perf_counter()
    token = _call_id.set(seen.call_id)
    try:
        with _span(method, metadata, seen) if _traced() else nullcontext():
            try:
                yield seen
            except asyncio.CancelledError:
                seen.code = "CANCELLED"
                raise
    finally:
        seconds = time.perf_counter() - started
        CALLS.labels(rpc, seen.code).inc()
        CALL_SECONDS.labels(rpc).observe(seconds)
        # Callers could fill the log with their own errors, so these are DEBUG; the metrics count them.
        level = logging.INFO if seen.code in SERVER_ERRORS else logging.DEBUG
        log.log(level, "%s %s %.3f s", rpc, seen.code, seconds)
        _call_id.reset(token)


@contextmanager
def _span(method: str, metadata: dict[str, Any], seen: Observation) -> Iterator[None]:
    """A span, in the caller's trace if there is one. Without exceptions, whose messages may quote users."""
    with _tracer.start_as_current_span(
        method[1:],
        propagate.extract(metadata),
        SpanKind.SERVER,
        {"rpc.system": "grpc", "prefloop.call_id": seen.call_id},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        finally:
            span.set_attribute("rpc.grpc.status_code", seen.code)
            if seen.code in SERVER_ERRORS:
                span.set_status(Status(StatusCode.ERROR, seen.code))


def _traced() -> bool:
    """Whether spans are exported; creating them for nothing costs a sixth of an empty call."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


class AnswerSeen:
    """Records one answer as it arrives from the engine."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._asked = time.perf_counter()
        self._first: float | None = None

    def text(self) -> None:
        """Record that a piece of text arrived."""
        if self._first is None:
            self._first = time.perf_counter()
            FIRST_TOKEN_SECONDS.observe(self._first - self._asked)
            trace.get_current_span().add_event("first text")

    def end(self, generation: Generation) -> None:
        """Record the end of the answer."""
        tokens = len(generation.token_ids)
        TOKENS.labels("prompt").inc(self._prompt_tokens)
        TOKENS.labels("answer").inc(tokens)
        if self._first is not None and tokens > 1:
            TOKEN_SECONDS.observe((time.perf_counter() - self._first) / (tokens - 1))
        trace.get_current_span().set_attributes(
            {
                "prefloop.prompt_tokens": self._prompt_tokens,
                "prefloop.answer_tokens": tokens,
                "prefloop.finish_reason": generation.finish_reason,
            }
        )


@contextmanager
def observed_answer(prompt_tokens: int) -> Iterator[AnswerSeen]:
    """Observe an answer that is sampled in the block."""
    with _tracer.start_as_current_span("sample", record_exception=False, set_status_on_exception=False):
        yield AnswerSeen(prompt_tokens)


class CallIds(logging.Filter):
    """Gives every log record the id of its call, or "-"."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.call_id = _call_id.get() or "-"
        return True
