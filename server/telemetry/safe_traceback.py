"""Tracebacks that are safe to log: an error's place and class, and its message only for classes that never quote users.
The message of a tokenizer or an engine may quote what a user wrote."""

import traceback

from server.shared.errors import DatabaseError

TELLING: tuple[type[BaseException], ...] = (DatabaseError, OSError)


def safe_traceback(error: BaseException) -> str:
    """The error and its causes, with the place of each."""
    waiting, seen = [error], list[BaseException]()
    lines: list[str] = []
    while waiting:
        one = waiting.pop(0)
        # An error that was raised from its own group forms a cycle.
        if one in seen:
            continue
        seen.append(one)
        lines.append(
            ("after " if lines else "") + type(one).__name__ + (f": {one}" if isinstance(one, TELLING) else "")
        )
        lines += [f"  {at.filename}:{at.lineno} in {at.name}" for at in traceback.extract_tb(one.__traceback__)]
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        waiting += [cause for cause in (one.__cause__ or one.__context__,) if cause]
    return "\n".join(lines)
