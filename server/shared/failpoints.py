"""Places where a test kills the process as a power cut would: before and after operations that make data durable.

`PREFLOOP_FAILPOINT=rename:3` kills it (SIGKILL, no cleanup) before its third rename; `step:3:spin` and `step:3:block`
make the thread before the engine's third step spin, or wait, forever. Do not set the variable where data matters.
"""

import os
import signal
import threading
from typing import Literal, get_args

VARIABLE = "PREFLOOP_FAILPOINT"
# Around a commit, before an fsync, around a rename, before a file goes to shared storage, before old weights are
# removed, in the middle of a swap, before a step of the engine.
Failpoint = Literal["commit", "committed", "fsync", "rename", "renamed", "put", "prune", "exchange", "step"]
FAILPOINTS: tuple[str, ...] = get_args(Failpoint)

_passed = 0


def failpoint(name: Failpoint) -> None:
    """Kill the process here, or hang its thread, if the variable names this failpoint and this pass."""
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
