"""A file that is there whole or not at all."""

import os
import tempfile
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
    try:
        descriptor, partial = tempfile.mkstemp(".partial", f".{path.name}.", path.parent)
    except OSError as error:
        # By the name that was asked for.
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
