"""TLS for the server: certificates that may be renewed while it runs.

Every handshake looks whether the files changed. A certificate without its key, which renewing leaves for a moment, or
one that is out of its time is not taken: the pair before serves on.
"""

import logging
import ssl
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from server.shared.errors import ServiceError

log = logging.getLogger(__name__)

# When to say that a certificate ends.
SOON = timedelta(days=7)


class Certificates:
    """The PEM files of a certificate chain, its private key and, where clients must show a certificate of their own,
    of the authorities that sign those."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._paths = [path for path in (certificate, key, client_ca) if path]
        self._client_ca = client_ca
        self._read: Sequence[tuple[int, int, int]] = ()
        # Of what is served; and on which day that was last said.
        self._ends = datetime.max.replace(tzinfo=UTC)
        self._said: date | None = None

    def server_credentials(self) -> grpc.ServerCredentials:
        """Raises ServiceError where the files are no certificate and its key."""
        try:
            first = self._load()
        except (OSError, ValueError) as error:
            raise ServiceError(f"The TLS certificate and its key cannot be used: {error}.") from error
        return grpc.dynamic_ssl_server_credentials(
            first, self._renewed, require_client_authentication=bool(self._client_ca)
        )

    def _renewed(self) -> Any:
        """The new configuration; None, which keeps the present one, where nothing changed."""
        self._say_when_it_ends()
        try:
            return self._load() if self._state() != self._read else None
        except (OSError, ValueError) as error:
            log.warning("the new TLS certificate cannot be used, the one before it stays: %s", error)
            return None

    def _say_when_it_ends(self) -> None:
        """Once a day in its last days; each handshake asks."""
        now = datetime.now(UTC)
        if self._ends - now < SOON and self._said != now.date():
            self._said = now.date()
            log.warning("the TLS certificate expires on %s: renew it", f"{self._ends:%Y-%m-%d}")

    def _load(self) -> Any:
        state = self._state()
        certificate, key, *client_ca = self._paths
        # gRPC would take a pair that does not match, and refuse every client.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        for path in client_ca:
            context.load_verify_locations(path)
        ends = _check_time(certificate)
        chain = [(key.read_bytes(), certificate.read_bytes())]
        roots = client_ca[0].read_bytes() if client_ca else None
        self._read, self._ends = state, ends
        self._say_when_it_ends()
        return grpc.ssl_server_certificate_configuration(chain, roots)

    def _state(self) -> list[tuple[int, int, int]]:
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in (path.stat() for path in self._paths)]


def _check_time(certificate: Path) -> datetime:
    """When it expires. Raises ValueError where no client would take it today."""
    first = x509.load_pem_x509_certificate(certificate.read_bytes())
    now = datetime.now(UTC)
    if now > first.not_valid_after_utc:
        raise ValueError(f"it expired on {first.not_valid_after_utc:%Y-%m-%d}")
    if now < first.not_valid_before_utc:
        raise ValueError(f"it is not valid before {first.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    return first.not_valid_after_utc
