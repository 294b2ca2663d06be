"""Log lines and traces, in a separate process, since both are set up once per process."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

TRACED = """
from opentelemetry import trace
from server.telemetry.logs import configure_traces
configure_traces("{endpoint}")
with trace.get_tracer("test").start_as_current_span("one"):
    pass
"""
LOGGED = """
import logging
from server.telemetry.logs import configure_logs
configure_logs("{kind}", "{level}")
logging.getLogger("server.test").info("three %s", "words")
logging.getLogger("server.test").warning("trouble")
"""


def run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "NO_PROXY": "*"},
    )  # fmt: skip
    return result.stderr


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:
        self.heard.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


def test_spans_reach_a_collector() -> None:
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        run(TRACED.format(endpoint=f"http://127.0.0.1:{port}"))
    finally:
        server.stop(None)
    [request] = collector.heard
    [resource] = request.resource_spans
    names = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert names["service.name"] == "prefloop"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["one"]


def test_without_a_collector_nothing_is_set_up() -> None:
    assert (
        run(TRACED.format(endpoint="") + "\nassert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)")
        == ""
    )


def test_text_logs_and_json_logs() -> None:
    first, second = run(LOGGED.format(kind="text", level="INFO")).splitlines()
    assert first.endswith(" INFO server.test [-]: three words")
    assert second.endswith(" WARNING server.test [-]: trouble")
    [line] = run(LOGGED.format(kind="json", level="WARNING")).splitlines()
    told = json.loads(line)
    assert told.pop("time")
    assert told == {"level": "WARNING", "logger": "server.test", "call_id": "-", "message": "trouble"}
