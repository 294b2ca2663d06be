"""Pages of what there is: as much as was asked for, and no more bytes than any client takes.

gRPC's clients take messages of 4 MiB unless they are told otherwise.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message

from server.rpc.to_proto import page_token

PAGE_BYTES = 2 * 2**20
# Records that are read at once: a page may be full after few of them.
CHUNK = 20

M = TypeVar("M", bound=Message)
R = TypeVar("R")


def fill(entries: Iterable[tuple[list[Any], M]], size: int) -> tuple[list[M], str]:
    """The messages of a page, one at least where there is one, and the token of the next page, empty at the end. Each
    entry is a message with the key of its place."""
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
    """All records, where `read` gives some that follow one, or the first; none at the end."""
    last: R | None = None
    while records := read(last):
        yield from records
        last = records[-1]
