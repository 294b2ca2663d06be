"""Configures the server's logs, as text or JSON, and traces to a collector."""

import logging
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

from server.telemetry.observation import CallIds

TEXT = "%(asctime)s %(levelname)s %(name)s [%(call_id)s]: %(message)s"
JSON = "%(asctime)s %(levelname)s %(name)s %(call_id)s %(message)s"
RENAMED = {"asctime": "time", "levelname": "level", "name": "logger"}


def configure_logs(kind: Literal["text", "json"], level: str) -> None:
    """Log one line per record, with the id of its call, to standard error."""
    handler = logging.StreamHandler()
    handler.addFilter(CallIds())
    handler.setFormatter(JsonFormatter(JSON, rename_fields=RENAMED) if kind == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def configure_traces(endpoint: str) -> None:
    """Send spans to an OTLP collector at `endpoint`, as http://127.0.0.1:4317. No traces if it is empty."""
    if not endpoint:
        return
    # This takes a second to import, so import it only if needed.
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "prefloop"}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
