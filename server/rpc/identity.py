"""The current caller: set once per call at the RPC edge, and read by code that runs on its behalf."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from server.store.keys import Caller

_caller: ContextVar[Caller] = ContextVar("caller")


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Run the block, and tasks that it starts, on behalf of `caller`."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def current_caller() -> Caller:
    """The current caller. Raises LookupError outside of a call."""
    return _caller.get()


def current_user() -> str:
    """The caller's user name. Raises LookupError outside of a call."""
    return _caller.get().user
