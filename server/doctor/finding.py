"""What a check found."""

from dataclasses import dataclass
from typing import Literal

# `wrong`: the server does not start, or loses something. `warning`: it runs, and not as it should.
State = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The value that was found and, unless it is ok, a sentence or two with what to do."""

    name: str
    state: State
    value: str
    advice: str = ""
