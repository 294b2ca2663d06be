"""Pages that hold at most the requested number of entries, and no more bytes than any client accepts.

gRPC clients accept messages of 4 MiB by default.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message

from server.rpc.to_proto import page_token

PAGE_BYTES = 2 * 2**20
# Records per read: a page may be full after a few of them.
CHUNK = 20

M = TypeVar("M", bound=Message)
R = TypeVar("R")


def fill(entries: Iterable[tuple[list[Any], M]], size: int) -> tuple[list[M], str]:
    """The messages of a page, at least one if any are left, and the token of the next page, empty at the end. An entry
    is the key of a position and a message."""
    page: list[M] = []
    taken, last = 0, list[Any]()
    for key, message in entries:
        taken += message.ByteSize()
        if page and (len(page) == size or taken > PAGE_BYTES):
            return page, page_token(last)
        page.append(message)
        last = key
    return page, ""


def in_chunks(read: Callable[[R | None], list[R]]) -> Iterator[R]:
    """Yield all records. `read` returns some that follow the given one, or the first ones; none at the end."""
    last: R | None = None
    while records := read(last):
        yield from records
        last = records[-1]
