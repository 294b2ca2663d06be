"""Code that vLLM imports into an engine's process before it loads anything.

- The process ends when its server does. vLLM's own would wait forever, with all its memory, for a killed server, also
  for one that was killed while the model was being loaded and compiled; so this starts with the import.
- The process reports its health (`server.engine.watchdog`), also from the import on.
- vLLM's kernel for rotary embeddings is patched (`rotate_every_head`), before a model is made.
- Its scheduler (`Stepped`) records the end of each step, limits a step's tokens, and shares them among the prompts.
  vLLM's own scheduler reads the first prompts to their end while the others wait.
"""

import os
import select
import signal
import threading
import time
from itertools import islice
from typing import Any

from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from server.engine.prefill_shares import prefill_share
from server.engine.vllm_worker import SwapExtension
from server.engine.watchdog import BEAT_SECONDS, Pulse
from server.shared.failpoints import failpoint
from server.shared.model.rotary import rotate_every_head
from server.shared.model.seeds import keep_seeds

PULSE = Pulse.find()
# The scheduler of this process's engine, once it is created.
scheduler: Any = None


class EngineExtension(SwapExtension):
    """Mixed into the worker, which is in the engine's process (`server.engine.vllm_start`)."""

    def prefloop_keep_seeds(self) -> None:
        """Support seeded answers to long prompts (`keep_seeds`). Call it once, before the first request."""
        keep_seeds(self.model_runner)

    def prefloop_limit_steps(self, tokens: int) -> None:
        """Limit steps to this many tokens, at least one for each answer; long prompts are read in parts."""
        scheduler.max_num_scheduled_tokens = tokens


class Stepped:
    """Mixed into vLLM's scheduler. A step begins with `schedule` and ends with `update_from_output`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        global scheduler
        super().__init__(*arguments, **named)
        scheduler = self
        self._ended = 0.0

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        self._share()
        began = time.monotonic()
        step = super().schedule(*arguments, **named)  # type: ignore[misc]
        step.prefloop_began = began
        if step.total_num_scheduled_tokens:
            failpoint("step")
        return step

    def _share(self) -> None:
        running: list[Any] = self.running  # type: ignore[attr-defined]
        room: int = self.max_num_running_reqs - len(running)  # type: ignore[attr-defined]
        waiting: list[Any] = list(islice(self.waiting, room))  # type: ignore[attr-defined]
        remaining = [request.num_prompt_tokens - request.num_computed_tokens for request in running + waiting]
        reading = [tokens for tokens in remaining if tokens > 0]
        # The others are being answered, and take one token each.
        tokens: int = self.max_num_scheduled_tokens - (len(remaining) - len(reading))  # type: ignore[attr-defined]
        self.scheduler_config.long_prefill_token_threshold = prefill_share(reading, tokens)  # type: ignore[attr-defined]

    def update_from_output(self, step: Any, output: Any) -> Any:
        # A step that is scheduled while another one runs begins when that one ends.
        began, self._ended = max(step.prefloop_began, self._ended), time.monotonic()
        if PULSE and step.total_num_scheduled_tokens:
            PULSE.step(began, self._ended, step.total_num_scheduled_tokens)
        return super().update_from_output(step, output)  # type: ignore[misc]


class SteppedScheduler(Stepped, Scheduler):  # type: ignore[misc]
    """vLLM's synchronous scheduler, with `Stepped`."""


class SteppedAsyncScheduler(Stepped, AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler that schedules a step while the previous one runs, with `Stepped`."""


def end_with_parent() -> None:
    """Kill this process once its parent has ended."""
    parent = os.pidfd_open(os.getppid())
    # Readable once the process has ended.
    select.select([parent], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def beat() -> None:
    while PULSE:
        PULSE.beat(time.monotonic())
        time.sleep(BEAT_SECONDS)


rotate_every_head(RotaryEmbedding)
for work in (end_with_parent, beat):
    threading.Thread(target=work, name=work.__name__, daemon=True).start()
