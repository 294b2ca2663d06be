"""Python client of a prefloop server: `from clients import Client`, or `AsyncClient` for asyncio.

The two have the same methods. An `AsyncClient` belongs to the event loop that is running when it is created.
"""

from clients.async_client import AsyncClient
from clients.calls import AsyncStream, ChatEvent, CompareEvent, Stream
from clients.channel import Tls
from clients.client import Client
from clients.errors import (
    BusyError,
    ConflictError,
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    NotStartedError,
    PrefloopError,
    ServerError,
    TimedOutError,
    UnavailableError,
    UntrustedError,
)

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BusyError",
    "ChatEvent",
    "Client",
    "CompareEvent",
    "ConflictError",
    "InvalidRequestError",
    "NotAllowedError",
    "NotFoundError",
    "NotStartedError",
    "PrefloopError",
    "ServerError",
    "Stream",
    "TimedOutError",
    "Tls",
    "UnavailableError",
    "UntrustedError",
]
