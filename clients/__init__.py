"""Python client of a prefloop server: `from clients import Client`."""

from clients.channel import Tls
from clients.client import ChatEvent, Client, CompareEvent, Stream
from clients.errors import (
    BusyError,
    ConflictError,
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    PrefloopError,
    ServerError,
    TimedOutError,
    UnavailableError,
)

__all__ = [
    "BusyError",
    "ChatEvent",
    "Client",
    "CompareEvent",
    "ConflictError",
    "InvalidRequestError",
    "NotAllowedError",
    "NotFoundError",
    "PrefloopError",
    "ServerError",
    "Stream",
    "TimedOutError",
    "Tls",
    "UnavailableError",
]
