"""Where the database is, as libpq reads it: `postgresql://user@host:port/name?sslmode=verify-full`.

A password may be in the address, in PGPASSWORD, or in a password file (PGPASSFILE). It is in no message.
"""

import os
from collections.abc import Mapping
from typing import Any

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from server.shared.errors import DataDirectoryError
from server.shared.loopback import is_loopback

# What checks that the server is the one that was meant. Anything else can be read, or answered, by who is in between.
VERIFIED = ("verify-full", "verify-ca")
CONNECT_SECONDS = 10
# A server that is gone without a word is noticed within half a minute.
KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000}
NO_ADDRESS = (
    "store_url is no PostgreSQL address: postgresql://user@host:port/name; in a password, write @, / and : as %40, %2F "
    "and %3A."
)


def conninfo(url: str) -> str:
    """The address with what was left open. Beyond loopback the server's certificate is verified: `verify-full` with the
    machine's authorities, unless others or `verify-ca` are named. Raises DataDirectoryError."""
    given = parts(url)
    if not _is_near(given):
        mode = given.setdefault("sslmode", VERIFIED[0])
        if mode not in VERIFIED:
            raise DataDirectoryError(f"store_url: sslmode={mode} beyond loopback; use {' or '.join(VERIFIED)}.")
        if mode == VERIFIED[0]:
            given.setdefault("sslrootcert", "system")
    given.setdefault("connect_timeout", CONNECT_SECONDS)
    given.setdefault("application_name", "prefloop")
    for name, value in KEEPALIVE.items():
        given.setdefault(name, value)
    return make_conninfo("", **given)


def parts(url: str) -> dict[str, Any]:
    """The address in its parts. Raises DataDirectoryError, whose message does not quote it: a password that is not
    escaped may be in any of them."""
    try:
        given = conninfo_to_dict(url)
    except ProgrammingError as error:
        raise DataDirectoryError(NO_ADDRESS) from error
    ports = str(given.get("port") or "").replace(",", "")
    if any("@" in str(given.get(name) or "") for name in ("host", "dbname")) or not (ports.isdigit() or not ports):
        raise DataDirectoryError(NO_ADDRESS)
    if given.get("service") or os.environ.get("PGSERVICE"):
        raise DataDirectoryError("store_url: name the host; a service file may name any, and turn verification off.")
    return given


def place(url: str) -> str:
    """The address for messages: without the password and everything else that may be secret."""
    given = parts(url)
    host, name = given.get("hostaddr") or given.get("host") or "localhost", given.get("dbname") or ""
    port = f":{given['port']}" if given.get("port") else ""
    return f"postgresql://{host}{port}/{name}"


def _is_near(given: Mapping[str, object]) -> bool:
    """Whether every host is loopback or a Unix socket."""
    named = given.get("hostaddr") or given.get("host") or os.environ.get("PGHOSTADDR") or os.environ.get("PGHOST")
    hosts = str(named or "").split(",")
    return all(not host or host.startswith(("/", "@")) or is_loopback(host) for host in hosts)
