"""Limits that uvicorn lacks: on the number of connections, on the time to send a request's headers, and on a request's
size, which its parser in C does not have."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# A browser opens at most six. By default a process may have 1,024 open files.
CONNECTIONS = 800
HEADERS_SECONDS = 20.0
HEADER_BYTES = 64 * 1024
# Of a whole request; pages and gateway have lower limits for their bodies.
REQUEST_BYTES = 8 * 2**20


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 that closes connections above the limit, and those whose request is too long or does not arrive in
    time."""

    _late: asyncio.TimerHandle | None = None
    # Of the request that is arriving.
    _bytes = 0
    _in_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._bytes, self._in_headers = 0, True

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._bytes += len(data)
        if self.transport.is_closing():
            return
        if self._bytes > (HEADER_BYTES if self._in_headers else REQUEST_BYTES):
            self.send_400_response("The request is too long.")
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait(self) -> None:
        """Starts the timer when a request could begin; a request that is being answered has no limit."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(HEADERS_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
