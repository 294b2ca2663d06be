"""What the log may say of an error: where it came from, and of what kind it is; what it says only where no library puts
values there. A tokenizer or an engine may quote in its message what a person wrote."""

import traceback

from server.shared.errors import DatabaseError

TELLING: tuple[type[BaseException], ...] = (DatabaseError, OSError)


def safe_traceback(error: BaseException) -> str:
    """The error and all that led to it, with the place of each."""
    waiting, seen = [error], list[BaseException]()
    lines: list[str] = []
    while waiting:
        one = waiting.pop(0)
        # A group's error that was raised from its group stands in a ring.
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
