"""`/metrics` for Prometheus and `/healthz` for health checks, over HTTP on a separate thread."""

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from server.telemetry.metrics import REGISTRY


class MetricsServer:
    """Listens once created; raises OSError if the port is in use. `serving` is what /healthz reports."""

    def __init__(self, host: str, port: int, serving: Callable[[], bool]) -> None:
        self._server = make_server(host, port, application(serving), _Server, _Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def application(serving: Callable[[], bool]) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    metrics: Any = make_wsgi_app(REGISTRY)

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                found: Iterable[bytes] = metrics(environ, start_response)
                return found
            case "/healthz":
                status, body = ("200 OK", b"SERVING\n") if serving() else ("503 Service Unavailable", b"NOT_SERVING\n")
            case _:
                status, body = "404 Not Found", b"Not found; there are /metrics and /healthz.\n"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [body]

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    # A client that sends nothing must not hold a thread forever.
    timeout = 10

    def log_message(self, format: str, *arguments: Any) -> None:
        """Do not log scrapes."""
