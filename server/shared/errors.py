"""The domain's errors. `server.rpc.grpc_status` maps each to a gRPC status at the RPC edge."""

import errno
from collections.abc import Sequence
from typing import Literal


class ServiceError(Exception):
    """Base of every error that may be reported to a caller. The message is one sentence for the caller."""


class InvalidArgumentError(ServiceError):
    """Fields of the request are invalid; `violations` has all of them, each with its sentence, `field` is the first."""

    def __init__(
        self, field: str, message: str, reason: str = "INVALID_FIELD", others: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.field = field
        self.reason = reason
        self.violations = [(field, message), *others]


class NotFoundError(ServiceError):
    """Not found, or not this user's: callers cannot tell the two apart."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"There is no {kind} {name!r}.")
        self.kind = kind
        self.name = name


class UnauthenticatedError(ServiceError):
    """The caller is unknown."""


class PermissionDeniedError(ServiceError):
    """The caller is known but lacks permission."""


class FailedPreconditionError(ServiceError):
    """The request is valid but not possible in the current state; `reason` is a constant for programs."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConflictError(ServiceError):
    """Somebody else was first: a compare-and-set lost, or a lease went to another holder."""


class ResourceExhaustedError(ServiceError):
    """A limit of the caller, or of all callers, was reached. `reason` says which; `retry_seconds` says when to try
    again, and is None if waiting alone does not help."""

    def __init__(self, reason: str, message: str, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_seconds = retry_seconds


class DeadlineExceededError(ServiceError):
    """The call took too long."""


class UnavailableError(ServiceError):
    """Temporarily unavailable; the same call may succeed later."""


class NoEngineError(ServiceError):
    """This server has no engine, and the call needs one."""


class DataDirectoryError(ServiceError):
    """The data directory cannot be used; the message says what to do."""


class ManifestError(ServiceError):
    """A policy directory does not match its manifest, or has none."""


class DatabaseError(Exception):
    """The database failed, and nothing from the transaction was stored. `kind`: its disk is full, its files are
    damaged, another process has locked it, or something else."""

    def __init__(self, message: str, kind: Literal["full", "damaged", "busy", "other"] = "other") -> None:
        super().__init__(message)
        self.kind = kind


def advice(error: OSError | DatabaseError) -> str:
    """Advice for an error of the file system or the database, as the end of a sentence."""
    if isinstance(error, OSError):
        kind = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "other"
    else:
        kind = error.kind
    return {
        "full": "free some space on its disk",
        "damaged": "restore it from a backup",
        "busy": "another process has locked it; try again when that has ended",
        "other": "give --data-dir a folder that you may write to",
    }[kind]
