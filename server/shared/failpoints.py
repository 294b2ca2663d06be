"""Places where a test ends the process as a power cut would: before and after what makes something durable.

`PREFLOOP_FAILPOINT=rename:3` ends it (SIGKILL, no cleanup) as it is about to make its third rename; `step:3:spin` and
`step:3:block` leave the thread that is about to make the engine's third step at work, or waiting, for ever. Off where
the variable is not set, as it should be wherever data matter.
"""

import os
import signal
import threading
from typing import Literal, get_args

VARIABLE = "PREFLOOP_FAILPOINT"
# Around a commit, before an fsync, around a rename, before old weights are removed, in the middle of a swap, before a
# step of the engine.
Failpoint = Literal["commit", "committed", "fsync", "rename", "renamed", "prune", "exchange", "step"]
FAILPOINTS: tuple[str, ...] = get_args(Failpoint)

_passed = 0


def failpoint(name: Failpoint) -> None:
    """Ends the process here, or holds its thread, if it was asked for and this is the time."""
    global _passed
    asked, time, how = [*os.environ.get(VARIABLE, "").split(":"), "", ""][:3]
    if asked != name:
        return
    _passed += 1
    if _passed != int(time or 1):
        return
    if how == "block":
        threading.Event().wait()
    while how == "spin":
        pass
    os.kill(os.getpid(), signal.SIGKILL)
