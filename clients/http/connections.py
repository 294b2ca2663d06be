"""Limits that uvicorn lacks: on the number of connections, and on the time to send a request's headers."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# A browser opens at most six. By default a process may have 1,024 open files.
CONNECTIONS = 800
HEADERS_SECONDS = 20.0


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections above the limit, and those whose request does not arrive in time."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
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
