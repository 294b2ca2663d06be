"""A file that is there whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text to write; it takes the place of `path` once the block ends well and all of it is on disk. What is no plain
    file, a pipe or a link say, is written as it comes."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    # Its name is known before it is made: whenever the block is interrupted, it goes.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _made(partial, path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _made(partial: Path, path: Path) -> TextIO:
    """A new file for its owner alone. Raises OSError by the name that was asked for."""
    try:
        return open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
