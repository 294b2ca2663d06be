"""What can go wrong, in the domain's words. `server.rpc.grpc_status` maps each to a gRPC status at the RPC edge."""

import errno
from collections.abc import Sequence
from typing import Literal


class ServiceError(Exception):
    """Base of every error that a caller may be told. The message is one sentence, fit for the caller to read."""


class InvalidArgumentError(ServiceError):
    """Fields of the request break rules; `violations` are all of them, each with its sentence, `field` the first."""

    def __init__(
        self, field: str, message: str, reason: str = "INVALID_FIELD", others: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.field = field
        self.reason = reason
        self.violations = [(field, message), *others]


class NotFoundError(ServiceError):
    """No such thing, or not this user's: the two are never told apart."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"There is no {kind} {name!r}.")
        self.kind = kind
        self.name = name


class UnauthenticatedError(ServiceError):
    """Nobody knows who calls."""


class PermissionDeniedError(ServiceError):
    """It is known who calls, and that they may not."""


class FailedPreconditionError(ServiceError):
    """The request is sound but not in this state; `reason` is a constant for programs."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConflictError(ServiceError):
    """Somebody else was first: a compare-and-set lost, or a lease went to another holder."""


class ResourceExhaustedError(ServiceError):
    """More than the caller, or everybody, may have; `reason` says which limit, `retry_seconds` when to try again, None
    where time alone does not help."""

    def __init__(self, reason: str, message: str, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_seconds = retry_seconds


class DeadlineExceededError(ServiceError):
    """It took too long."""


class UnavailableError(ServiceError):
    """Not now; the same call may go through later."""


class DataDirectoryError(ServiceError):
    """The data directory cannot be used; the message says what to do."""


class ManifestError(ServiceError):
    """A policy directory is not what its manifest says, or has none."""


class DatabaseError(Exception):
    """The database failed, and nothing of the transaction was kept. `kind`: its disk is full, its files are damaged,
    another process holds it, or something else."""

    def __init__(self, message: str, kind: Literal["full", "damaged", "busy", "other"] = "other") -> None:
        super().__init__(message)
        self.kind = kind


def advice(error: OSError | DatabaseError) -> str:
    """What may help against an error of the file system or the database, as the end of a sentence."""
    if isinstance(error, OSError):
        kind = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "other"
    else:
        kind = error.kind
    return {
        "full": "free some space on its disk",
        "damaged": "restore it from a backup",
        "busy": "another process holds it; try again when that has ended",
        "other": "give --data-dir a folder that you may write to",
    }[kind]
