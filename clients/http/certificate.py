"""The page's certificate. It may be renewed while the page runs; the next connection then gets the new one.

A pair that cannot be loaded, such as a new certificate with the old key, is ignored and the previous pair stays in use.
"""

import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


def serving_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """A TLS context that uses the current contents of the two PEM files for each connection. Raises OSError if they
    cannot be loaded now."""
    read, newest = _stamp(certificate, key), _load(certificate, key)

    def choose(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        # Called in every handshake, even without a host name.
        nonlocal read, newest
        try:
            if (found := _stamp(certificate, key)) != read:
                read, newest = found, _load(certificate, key)
        except OSError as error:
            log.warning("the page's new certificate cannot be loaded, the previous one stays in use: %s", error)
        connection.context = newest

    context = _load(certificate, key)
    context.sni_callback = choose
    return context


def _load(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Without a password argument, OpenSSL would prompt for one on the terminal.
    context.load_cert_chain(certificate, key, password="")
    return context


def _stamp(*paths: Path) -> Stamp:
    """A value that changes when a file is written or replaced."""
    return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in (path.stat() for path in paths))
