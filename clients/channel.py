"""gRPC channels: keepalive that a standard gRPC server accepts, quick reconnects, and one or several servers.

Several are "dns:///name:port", a name with several addresses, or on loopback "ip:port,ip:port". Calls go to
those in turn that can be reached and say that they serve. gRPC gets no retry policy; `clients.retries` retries calls,
so that one whose server went away is answered by another.
"""

import ipaddress
import json
import re
from dataclasses import dataclass

import grpc

from clients.loopback import is_loopback

# By default a gRPC server answers pings less than 5 minutes apart with GOAWAY; the extra 10 s are a margin.
KEEPALIVE_MILLISECONDS = 310_000
# A starting server holds its port for a minute without responding; gRPC's default would wait 20 s to report that.
CONNECT_MILLISECONDS = 4_000
# A long conversation with its spans and votes is one message.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


# A name that may have several addresses.
NAME = "dns:///"
IN_TURN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}})


def channel_target(address: str) -> str:
    """gRPC's name for one or several addresses. Raises ValueError for several that are not all IPv4 or all IPv6."""
    several = address.split(",")
    if len(several) == 1:
        return address
    try:
        versions = {ipaddress.ip_address(one.rpartition(":")[0].strip("[]")).version for one in several}
    except ValueError as error:
        raise ValueError(f"{address}: of several servers, give IP addresses, or one name that has them all.") from error
    if len(versions) > 1:
        raise ValueError(f"{address}: give addresses of one kind, IPv4 or IPv6.")
    return f"ipv{versions.pop()}:{address}"


def channel_options(address: str) -> list[tuple[str, str | int]]:
    """gRPC channel arguments for `address`."""
    options: list[tuple[str, str | int]] = [
        ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.min_reconnect_backoff_ms", CONNECT_MILLISECONDS),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ]
    if "," in address or address.startswith(NAME):
        options.append(("grpc.service_config", IN_TURN))
    if on_loopback(address):
        # A network proxy cannot reach this machine's loopback.
        options.append(("grpc.enable_http_proxy", 0))
    return options


@dataclass(frozen=True)
class Tls:
    """PEM bytes: the issuer of the server's certificate (None: the system's trusted issuers), and the client's own
    certificate and key for a server that requires them. Raises ValueError for anything that is not PEM, since gRPC
    would only fail to connect."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def __post_init__(self) -> None:
        for name, kind in (("ca", b"CERTIFICATE"), ("certificate", b"CERTIFICATE"), ("key", b"PRIVATE KEY")):
            pem = getattr(self, name)
            if pem is not None and not re.search(b"-----BEGIN [A-Z ]*" + kind + b"-----", pem):
                raise ValueError(f"{name} does not contain a PEM {kind.decode().lower()}.")


def open_channel(address: str, tls: Tls | None = None) -> grpc.Channel:
    """A channel to `address`, which connects on the first call. It is unencrypted only to this machine's loopback, and
    only if no `tls` is given."""
    credentials, options = channel_credentials(address, tls), channel_options(address)
    if credentials is None:
        return grpc.insecure_channel(channel_target(address), options=options)
    return grpc.secure_channel(channel_target(address), credentials, options=options)


def open_async_channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """The same for asyncio. The channel belongs to the running event loop."""
    credentials, options = channel_credentials(address, tls), channel_options(address)
    if credentials is None:
        return grpc.aio.insecure_channel(channel_target(address), options=options)
    return grpc.aio.secure_channel(channel_target(address), credentials, options=options)


def channel_credentials(address: str, tls: Tls | None) -> grpc.ChannelCredentials | None:
    """The credentials for an encrypted connection; None for an unencrypted one. Raises ValueError for an encrypted one
    to a list of addresses: there is no one name that a certificate could have."""
    if tls is None and on_loopback(address):
        return None
    if "," in address:
        raise ValueError(f"{address}: encrypted, several servers need one name for all, as {NAME}chat.example.org:443.")
    tls = tls or Tls()
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)


def on_loopback(address: str) -> bool:
    """Whether "host:port" or "[v6]:port", or all of several, are on this machine's loopback."""
    return all(is_loopback(one.rpartition(":")[0].strip("[]")) for one in address.split(","))
