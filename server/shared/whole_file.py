"""A file that is there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text to write; it takes the place of `path` once the block ends well. What is no file, a pipe say, is written
    as it comes."""
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        opened = partial.open("w", encoding="utf-8")
    except OSError as error:
        # By the name that was asked for.
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with opened as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
