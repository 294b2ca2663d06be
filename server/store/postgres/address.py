"""Where the database is, as libpq reads it: `postgresql://user@host:port/name?sslmode=verify-full`.

A password may be in the address, in PGPASSWORD, or in a password file (PGPASSFILE). It is in no message.
"""

from collections.abc import Mapping

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from server.shared.errors import DataDirectoryError
from server.shared.loopback import is_loopback

# What checks that the server is the one that was meant. Anything else can be read, or answered, by who is in between.
VERIFIED = ("verify-full", "verify-ca")
CONNECT_SECONDS = 10


def conninfo(url: str) -> str:
    """The address with what was left open. Beyond loopback the server's certificate is verified: `verify-full` with the
    machine's authorities, unless others or `verify-ca` are named. Raises DataDirectoryError."""
    try:
        given = conninfo_to_dict(url)
    except ProgrammingError as error:
        # Its message may quote the address.
        raise DataDirectoryError("store_url is no PostgreSQL address: postgresql://user@host:port/name.") from error
    if not _is_near(given):
        mode = given.setdefault("sslmode", VERIFIED[0])
        if mode not in VERIFIED:
            raise DataDirectoryError(f"store_url: sslmode={mode} beyond loopback; use {' or '.join(VERIFIED)}.")
        if mode == VERIFIED[0]:
            given.setdefault("sslrootcert", "system")
    given.setdefault("connect_timeout", CONNECT_SECONDS)
    given.setdefault("application_name", "prefloop")
    return make_conninfo("", **given)


def place(url: str) -> str:
    """The address for messages: without the password and everything else that may be secret."""
    given = conninfo_to_dict(url)
    host, name = given.get("hostaddr") or given.get("host") or "localhost", given.get("dbname") or ""
    port = f":{given['port']}" if given.get("port") else ""
    return f"postgresql://{host}{port}/{name}"


def _is_near(given: Mapping[str, object]) -> bool:
    """Whether every host is loopback or a Unix socket."""
    hosts = str(given.get("hostaddr") or given.get("host") or "").split(",")
    return all(not host or host.startswith(("/", "@")) or is_loopback(host) for host in hosts)
