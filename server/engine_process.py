"""What vLLM imports into an engine's process, before it loads anything: the process ends when its server's does.

vLLM's own would wait for ever, with all its memory, for a server that was killed; also for one that was killed while
the model was being loaded and compiled, which is why importing this is enough.
"""

import os
import select
import signal
import threading

from server.worker import SwapExtension

__all__ = ["SwapExtension"]


def end_with_parent() -> None:
    """Kills this process once its parent has ended."""
    parent = os.pidfd_open(os.getppid())
    # Readable once the process has ended.
    select.select([parent], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


threading.Thread(target=end_with_parent, name="end with parent", daemon=True).start()
