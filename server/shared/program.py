"""How a command of server and learner begins, and how it ends where the machine fails it."""

import getpass
import io
import os
import signal
import sys
from collections.abc import Callable

from server.shared.errors import DatabaseError, ServiceError, advice


def run(name: str, command: Callable[[], object]) -> None:
    """Runs the command. What goes wrong with its surroundings is one sentence, and exit status 1; told to end, it takes
    away what it has half made."""
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
    """Settles what a process inherits: files that it makes are its user's alone, its user has a name, and it can say
    anything to a terminal of any encoding."""
    os.umask(0o077)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        # In a container a user's number may have no name; torch asks for one, too.
        os.environ["LOGNAME"] = str(os.getuid())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _leave(number: int, frame: object) -> None:
    # A second one would interrupt what the first one has tidied up.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def sentence(error: Exception) -> str | None:
    """What happened, and what may help; None of an error of ours."""
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
