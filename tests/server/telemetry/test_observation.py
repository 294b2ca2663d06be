"""A call's id, its log lines and its spans, none of which may have user text."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prefloop.v1 import chat_pb2, feedback_pb2

from server.telemetry import logs
from tests.server.conftest import Running
from tests.server.rpc.test_rpcs import ANN, chat

EXPORTER = InMemorySpanExporter()


@pytest.fixture(scope="module", autouse=True)
def provider() -> None:
    # OpenTelemetry accepts only one provider per process.
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(EXPORTER))
    trace.set_tracer_provider(made)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    EXPORTER.clear()
    return EXPORTER


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the server writes to standard error as JSON."""
    root, stream = logging.getLogger(), io.StringIO()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr("sys.stderr", stream)
    logs.configure_logs("json", "DEBUG")
    yield stream
    root.handlers[:] = before
    root.setLevel(level)


def lines(written: io.StringIO) -> list[dict[str, str]]:
    return [json.loads(line) for line in written.getvalue().splitlines() if '"server.' in line]


async def test_a_call_has_an_id_in_its_answer_and_its_log_line(running: Running, written: io.StringIO) -> None:
    call = running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=(*ANN, ("x-request-id", "mine-1")))
    assert len([event async for event in call]) == 6
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine-1"
    [line] = [line for line in lines(written) if line["call_id"] == "mine-1"]
    assert (line["level"], line["logger"]) == ("DEBUG", "server.telemetry.observation")
    assert re.fullmatch(r"Chat OK \d+\.\d{3} s", line["message"])


async def test_an_invalid_id_is_replaced(running: Running) -> None:
    call = running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=(("x-request-id", "a b"),))
    await call
    assert dict(await call.trailing_metadata())["x-request-id"].startswith("call_")


async def test_an_error_has_its_id_and_the_log_has_the_rest(running: Running, written: io.StringIO) -> None:
    running.engine.encode = None  # type: ignore[method-assign, assignment]
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await chat(running, user=(*ANN, ("x-request-id", "mine-2")))
    assert failed.value.details() == "Internal error; the server's log has the cause."
    status, info = rpc_status.from_call(failed.value), error_details_pb2.RequestInfo()
    assert status is not None
    assert status.details[-1].Unpack(info)
    assert info.request_id == "mine-2"
    messages = [line["message"] for line in lines(written) if line["call_id"] == "mine-2"]
    assert messages[0].startswith("Internal error; the server's log has the cause.\nTypeError\n")
    assert re.fullmatch(r"Chat INTERNAL \d+\.\d{3} s", messages[1])


async def test_a_span_continues_the_callers_trace(running: Running, spans: InMemorySpanExporter) -> None:
    parent = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    await chat(running, user=(*ANN, parent))
    sample, call = spans.get_finished_spans()
    assert (call.name, sample.name) == ("prefloop.v1.ChatService/Chat", "sample")
    assert f"{call.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{call.parent.span_id:016x}" == "b7ad6b7169203331"
    assert sample.parent.span_id == call.context.span_id
    assert call.attributes["rpc.grpc.status_code"] == "OK"
    assert dict(sample.attributes) == {
        "prefloop.prompt_tokens": 2, "prefloop.answer_tokens": 4, "prefloop.finish_reason": "stop",
    }  # fmt: skip
    assert [event.name for event in sample.events] == ["first text"]


async def test_what_was_said_is_in_no_log_line_and_in_no_span(
    running: Running, spans: InMemorySpanExporter, written: io.StringIO
) -> None:
    running.engine.answer = "hidden1 hidden2"
    started, *_ = await chat(running, "hidden3")
    response_id = started.started.response_id
    thumb = feedback_pb2.SubmitThumbRequest(response_id=response_id, thumb=feedback_pb2.THUMB_UP, comment="hidden4")
    await running.feedback.SubmitThumb(thumb, metadata=ANN)
    correction = feedback_pb2.SubmitCorrectionRequest(response_id=response_id, text="hidden5")
    await running.feedback.SubmitCorrection(correction, metadata=ANN)
    running.engine.dies = True
    with pytest.raises(grpc.aio.AioRpcError):
        await chat(running, "hidden6")
    # The line is written after the caller has its status.
    async with asyncio.timeout(10):
        while "Chat UNAVAILABLE" not in written.getvalue():
            await asyncio.sleep(0.01)
    told = [json.loads(span.to_json()) for span in spans.get_finished_spans()]
    assert len(told) == 6
    assert "hidden" not in written.getvalue() + json.dumps(told)
