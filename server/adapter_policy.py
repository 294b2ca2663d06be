"""The policy where the engine serves adapters on the reference: several versions are live, and a swap moves no weights.

Each answer is pinned to one version from its first token to its last, whatever is activated meanwhile. Activating a
version, or going back to one, changes which one new answers get. vLLM finds an adapter's cache by its number, so that
no answer reads keys and values of another version; a version never changes, so its number never means something else.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.policy import SwapError
from server.records import Span
from server.registry import REFERENCE
from server.vllm_policy import VllmPolicy
from server.weights import adapter_weights, check_finite

log = logging.getLogger(__name__)


class AdapterPolicy(VllmPolicy):
    """Policy over an AsyncLLM that was started with the reference and `enable_lora`."""

    def __init__(self, start_engine: Callable[[], Any], directory: Path) -> None:
        super().__init__(start_engine, directory)
        self._directories: dict[str, Path] = {}

    def locate(self, data_dir: Path, version: str) -> Path:
        return adapter_weights(data_dir, version)

    async def keep_live(self, version: str, directory: Path) -> None:
        if version == REFERENCE or version in self._directories:
            return
        try:
            await asyncio.to_thread(check_finite, directory)
        except ValueError as error:
            raise SwapError(f"{version}: {error}") from error
        self._directories[version] = directory
        # Where the engine later makes room for others, it reads it again by itself.
        await self._ask(self._engine.add_lora(self._adapter(version)))

    async def _swap(self, version: str, directory: Path) -> None:
        await self.keep_live(version, directory)
        self._version, self._directory = version, directory
        self._admitted.set()
        log.info("new answers come from %s", version)

    async def _prepare(self) -> None:
        await self._ask(self._engine.update_weight_version(REFERENCE))

    def _adapter(self, version: str) -> Any:
        from vllm.lora.request import LoRARequest

        if version == REFERENCE:
            return None
        if version not in self._directories:
            raise ValueError(f"{version} was never loaded")
        return LoRARequest(version, int(version[1:]), str(self._directories[version]))

    def _spans(self, labelled: list[Span], version: str) -> list[Span]:
        """One, of the version that the answer was pinned to; vLLM knows the reference's label alone."""
        return [Span(labelled[0].start, labelled[-1].end, version)] if labelled else []
