"""TLS for the server, with certificates that may be renewed while it runs.

Every handshake checks whether the files changed. A certificate that does not match its key, as for a moment during a
renewal, or that is outside its validity period is not accepted: the previous pair stays in use.
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

# When to start warning that a certificate expires.
SOON = timedelta(days=7)


class Certificates:
    """The PEM files of a certificate chain, its private key and, if clients must show a certificate, of the authorities
    that sign those."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._paths = [path for path in (certificate, key, client_ca) if path]
        self._client_ca = client_ca
        self._read: Sequence[tuple[int, int, int]] = ()
        # When the served certificate expires, and the day of the last warning.
        self._ends = datetime.max.replace(tzinfo=UTC)
        self._said: date | None = None

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files. Raises ServiceError if they are not a certificate and its key."""
        try:
            first = self._load()
        except (OSError, ValueError) as error:
            raise ServiceError(f"The TLS certificate and its key cannot be used: {error}.") from error
        return grpc.dynamic_ssl_server_credentials(
            first, self._renewed, require_client_authentication=bool(self._client_ca)
        )

    def _renewed(self) -> Any:
        """The new configuration; None, which keeps the current one, if nothing changed."""
        self._say_when_it_ends()
        try:
            return self._load() if self._state() != self._read else None
        except (OSError, ValueError) as error:
            log.warning("the new TLS certificate cannot be used; keeping the previous one: %s", error)
            return None

    def _say_when_it_ends(self) -> None:
        """Log a warning once per day in the last days; every handshake calls this."""
        now = datetime.now(UTC)
        if self._ends - now < SOON and self._said != now.date():
            self._said = now.date()
            log.warning("the TLS certificate expires on %s: renew it", f"{self._ends:%Y-%m-%d}")

    def _load(self) -> Any:
        state = self._state()
        certificate, key, *client_ca = self._paths
        # gRPC would accept a pair that does not match, and then refuse every client.
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
    """When the certificate expires. Raises ValueError if no client would accept it today."""
    first = x509.load_pem_x509_certificate(certificate.read_bytes())
    now = datetime.now(UTC)
    if now > first.not_valid_after_utc:
        raise ValueError(f"it expired on {first.not_valid_after_utc:%Y-%m-%d}")
    if now < first.not_valid_before_utc:
        raise ValueError(f"it is not valid before {first.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    return first.not_valid_after_utc
