"""What uvicorn does not bound: how many connections there are, and how long one may take over a request's headers."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# Browsers open six at most. A process may have 1,024 files open unless it is told otherwise.
CONNECTIONS = 800
HEADERS_SECONDS = 20.0


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on a connection too many, and on one whose request does not come in time."""

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
        """Counts from when a request could have begun; what is being answered has its time."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(HEADERS_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
