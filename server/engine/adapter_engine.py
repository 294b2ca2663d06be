"""An engine that serves adapters on the reference: several versions are live, and a swap moves no weights.

Each answer is pinned to one version from its first token to its last, whatever is activated in the meantime. An
activation or rollback only changes the version of new answers. vLLM keys an adapter's cache by its number, so no answer
reads keys and values of another version; a version never changes, and neither does its number.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.engine.base import SwapError
from server.engine.vllm_engine import VllmEngine
from server.engine.vllm_stream import Labels
from server.engine.weights import adapter_weights, finite_tensors
from server.shared.errors import ManifestError
from server.shared.model.dtype import DtypeName
from server.store.chats.records import Span
from server.store.files.manifest import verify

log = logging.getLogger(__name__)


class AdapterEngine(VllmEngine):
    """Engine over an AsyncLLM that was started with the reference and `enable_lora`."""

    def __init__(self, start_engine: Callable[[], Any], directory: Path, dtype: DtypeName) -> None:
        super().__init__(start_engine, directory, dtype)
        self._directories: dict[str, Path] = {}

    def locate(self, data_dir: Path, version: str) -> Path:
        return adapter_weights(data_dir, version, self.reference)

    async def keep_live(self, version: str, directory: Path) -> None:
        if version == self.reference or version in self._directories:
            return
        try:
            await asyncio.to_thread(lambda: deque(finite_tensors(directory), maxlen=0))
        except ValueError as error:
            raise SwapError(f"{version}: {error}") from error
        # If the engine later evicts it for others, it reloads it by itself.
        try:
            await self._ask(self._engine.add_lora(request(version, directory)))
        except Exception as error:
            if not self.alive:
                raise
            raise SwapError(f"{version} could not be loaded: {error}") from error
        self._directories[version] = directory

    async def _swap(self, version: str, directory: Path) -> None:
        await self.keep_live(version, directory)
        self._version, self._directory = version, directory
        self._admitted.set()
        log.info("new answers come from %s", version)

    async def _make_spare(self) -> None:
        """Check the loaded adapters again. No spare is needed, since no weights are exchanged."""
        for version, directory in list(self._directories.items()):
            try:
                await asyncio.to_thread(verify, directory)
            except ManifestError as error:
                log.error("%s is no longer served: %s", version, error)
                del self._directories[version]

    def _adapter(self, version: str) -> Any:
        if version == self.reference:
            return None
        if version not in self._directories:
            raise ValueError(f"{version} was never loaded")
        return request(version, self._directories[version])

    def _labels(self, version: str) -> Labels:
        """One span, of the version that the answer was pinned to; vLLM only knows the reference's label."""

        def pinned(labelled: list[Span]) -> list[Span]:
            return [Span(labelled[0].start, labelled[-1].end, version)] if labelled else []

        return Labels(lambda: version, pinned)


def request(version: str, directory: Path) -> Any:
    """The vLLM request for an adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(version, int(version[1:]), str(directory))
