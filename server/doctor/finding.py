"""The result of a check."""

from dataclasses import dataclass
from typing import Literal

# `wrong`: the server does not start, or loses data. `warning`: it runs, but not as it should.
State = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The value that was found and, unless it is ok, a sentence or two of advice."""

    name: str
    state: State
    value: str
    advice: str = ""
