"""How a client connects: keepalive that a standard gRPC server accepts, and quick attempts to connect again.

gRPC is given no retry policy; `clients.retries` repeats calls.
"""

import re
from dataclasses import dataclass

import grpc

from clients.loopback import is_loopback

# Servers answer pings closer together than 5 minutes with GOAWAY; the 10 s on top keep clear of that edge.
KEEPALIVE_MILLISECONDS = 310_000
# A server that starts has its port already and says nothing on it for a minute; gRPC would wait 20 s before it says so.
CONNECT_MILLISECONDS = 4_000
# A long conversation with its spans and votes comes as one message.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


def channel_options(address: str) -> list[tuple[str, str | int]]:
    """gRPC channel arguments for `address` ("host:port")."""
    options: list[tuple[str, str | int]] = [
        ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.min_reconnect_backoff_ms", CONNECT_MILLISECONDS),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ]
    if on_loopback(address):
        # A proxy set for the network cannot reach this machine's own loopback.
        options.append(("grpc.enable_http_proxy", 0))
    return options


@dataclass(frozen=True)
class Tls:
    """PEM bytes: of who signed the server's certificate (None: who this system trusts), and, for a server that asks for
    one, of the client's own certificate and its key. Raises ValueError for what is none: gRPC would only fail to
    connect."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def __post_init__(self) -> None:
        for name, kind in (("ca", b"CERTIFICATE"), ("certificate", b"CERTIFICATE"), ("key", b"PRIVATE KEY")):
            pem = getattr(self, name)
            if pem is not None and not re.search(b"-----BEGIN [A-Z ]*" + kind + b"-----", pem):
                raise ValueError(f"{name} holds no {kind.decode().lower()} in PEM.")


def open_channel(address: str, tls: Tls | None = None) -> grpc.Channel:
    """A channel to `address`; it connects with the first call. In the clear to this machine's own loopback, where no
    `tls` is given, and never to anywhere else."""
    credentials, options = channel_credentials(address, tls), channel_options(address)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def open_async_channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """The same for asyncio. The channel belongs to the event loop that runs now."""
    credentials, options = channel_credentials(address, tls), channel_options(address)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def channel_credentials(address: str, tls: Tls | None) -> grpc.ChannelCredentials | None:
    """Of an encrypted connection; None for one in the clear."""
    if tls is None and on_loopback(address):
        return None
    tls = tls or Tls()
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)


def on_loopback(address: str) -> bool:
    """Whether "host:port" or "[v6]:port" is on this machine's loopback."""
    return is_loopback(address.rpartition(":")[0].strip("[]"))
