"""Start of a server or learner command, and its end after errors and signals."""

import getpass
import io
import os
import signal
import sys
from collections.abc import Callable

from server.shared.errors import DatabaseError, ServiceError, advice


def run(name: str, command: Callable[[], object]) -> None:
    """Run the command. Errors of its environment are one sentence and exit status 1; SIGTERM exits after cleaning up
    half-made files."""
    begin()
    signal.signal(signal.SIGTERM, _leave)
    try:
        command()
    except Exception as error:
        if (said := sentence(error)) is None:
            raise
        print(f"{name}: {said}", file=sys.stderr)
        raise SystemExit(1) from None


def begin() -> None:
    """Set up the process: its files are private to its user, the user has a name, and any text can be printed on a
    terminal of any encoding."""
    os.umask(0o077)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        # In a container a user id may have no name, which torch needs.
        os.environ["LOGNAME"] = str(os.getuid())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _leave(number: int, frame: object) -> None:
    # A second signal would interrupt the cleanup after the first one.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def sentence(error: Exception) -> str | None:
    """The error and what may help, as a sentence; None for a bug."""
    match error:
        case ServiceError():
            return str(error)
        case OSError(filename=str() | bytes() as file):
            return f"{os.fsdecode(file)!r}: {error.strerror}."
        case OSError():
            return f"{error}."
        case DatabaseError():
            return f"The data directory cannot be used ({error}); {advice(error)}."
    return None
