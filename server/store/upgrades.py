"""What several releases on one database may do."""

from collections.abc import Callable

from server.shared.errors import DataDirectoryError

# A process without a heartbeat for this long is gone.
SIGN_SECONDS = 30


def check(place: str, applied: set[str], known: set[str], alive: Callable[[], str | None]) -> None:
    """Raise DataDirectoryError if a newer release has been here, or if steps are missing while a process of an older
    one is `alive`. `place` begins a sentence."""
    if newer := applied - known:
        raise DataDirectoryError(
            f"{place} was written by a newer prefloop ({min(newer)}); upgrade prefloop or choose another --data-dir."
        )
    if applied and known - applied and (name := alive()):
        raise DataDirectoryError(
            f"{place} is in use by an older prefloop, the {name}; stop it, "
            f"and start this one {SIGN_SECONDS} seconds after it has ended."
        )
