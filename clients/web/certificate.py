"""The page's certificate, which may be renewed while the page runs: the next connection gets the new one.

A pair that cannot be used, such as a certificate whose key is not there yet, is not taken: the one before goes on.
"""

import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


def serving_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS with what the two PEM files hold whenever somebody connects. Raises OSError where that is of no use now."""
    read, newest = _stamp(certificate, key), _load(certificate, key)

    def choose(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        # Called by every handshake, also by one that names no host.
        nonlocal read, newest
        try:
            if (found := _stamp(certificate, key)) != read:
                read, newest = found, _load(certificate, key)
        except OSError as error:
            log.warning("the page's new certificate cannot be used, the one before it stays: %s", error)
        connection.context = newest

    context = _load(certificate, key)
    context.sni_callback = choose
    return context


def _load(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Without a password of ours, OpenSSL would ask the terminal for one.
    context.load_cert_chain(certificate, key, password="")
    return context


def _stamp(*paths: Path) -> Stamp:
    """Another one when a file was written or replaced."""
    return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in (path.stat() for path in paths))
