"""Who calls: set once for each call at the RPC edge, read by whatever runs on its behalf."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from server.store.keys import Caller

_caller: ContextVar[Caller] = ContextVar("caller")


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Everything inside, tasks that it starts included, is done for `caller`."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def current_caller() -> Caller:
    """Who calls. Raises LookupError outside of a call."""
    return _caller.get()


def current_user() -> str:
    """The caller's user name. Raises LookupError outside of a call."""
    return _caller.get().user
