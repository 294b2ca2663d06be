"""The trainer's classes stay the trainer's while vLLM serves the same model in this process.

Where vLLM has no code of its own for a family, it serves transformers' classes, and changes them: an instance that was
made before can no longer be called, and none can be made after.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHANGED = ("__init__", "__call__")


@contextmanager
def unchanged_classes() -> Iterator[None]:
    """Whatever the block does to transformers' model classes is undone. An engine that does not compile works with them
    as they were, too."""
    from transformers import PreTrainedModel

    before = {kind: {name: vars(kind).get(name) for name in CHANGED} for kind in _subclasses(PreTrainedModel)}
    yield
    for kind, methods in before.items():
        for name, method in methods.items():
            if method is not None:
                setattr(kind, name, method)
            elif name in vars(kind):
                delattr(kind, name)


def _subclasses(kind: Any) -> Iterator[Any]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)
