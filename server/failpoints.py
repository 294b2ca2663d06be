"""Places where a test ends the process as a power cut would: before and after what makes something durable.

`PREFLOOP_FAILPOINT=rename:3` ends it (SIGKILL, no cleanup) as it is about to make its third rename. Off where the
variable is not set, as it should be wherever data matter.
"""

import os
import signal
from typing import Literal, get_args

VARIABLE = "PREFLOOP_FAILPOINT"
# Around a commit, before an fsync, around a rename, before old weights are removed, in the middle of a swap.
Failpoint = Literal["commit", "committed", "fsync", "rename", "renamed", "prune", "exchange"]
FAILPOINTS: tuple[str, ...] = get_args(Failpoint)

_passed = 0


def failpoint(name: Failpoint) -> None:
    """Ends the process here, if it was asked for and this is the time."""
    global _passed
    asked, _, time = os.environ.get(VARIABLE, "").partition(":")
    if asked == name:
        _passed += 1
        if _passed == int(time or 1):
            os.kill(os.getpid(), signal.SIGKILL)
