"""An engine that serves adapters on the reference: several versions are live, and a swap moves no weights.

Each answer is pinned to one version from its first token to its last, whatever is activated in the meantime. An
activation or rollback only changes the version of new answers. vLLM keys an adapter's cache by its number, so no answer
reads keys and values of another version; a version never changes, and neither does its number.

A version on another reference needs an engine that was started with that: once running answers have ended, the engine
is restarted, which takes as long as a start, and new answers wait.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from server.engine.base import SwapError
from server.engine.vllm_engine import VllmEngine
from server.engine.vllm_stream import Labels
from server.engine.weights import adapter_weights, finite_tensors
from server.shared.errors import ManifestError
from server.shared.model.dtype import DtypeName
from server.store.chats.records import Span
from server.store.files.manifest import read_manifest, verify

log = logging.getLogger(__name__)

# How long running answers may take to end before the reference is changed, and how often one looks.
DRAIN_SECONDS, DRAIN_POLL_SECONDS = 60.0, 0.05


class AdapterEngine(VllmEngine):
    """Engine over an AsyncLLM that was started with the reference and `enable_lora`."""

    def __init__(self, start_engine: Callable[[Path], Any], directory: Path, dtype: DtypeName) -> None:
        super().__init__(start_engine, directory, dtype)
        self._directories: dict[str, Path] = {}
        # The version that was loaded before the reference was to be changed, while that is under way.
        self._before = ""

    def locate(self, data_dir: Path, version: str) -> Path:
        return adapter_weights(data_dir, version)

    @property
    def version(self) -> str:
        # While the reference is changed, what was loaded before: nothing else may yet be.
        return self._before or super().version

    @property
    def live_versions(self) -> list[str]:
        return list(dict.fromkeys([self.version, self.reference, *self._directories]))

    async def keep_live(self, version: str, directory: Path) -> None:
        if version == self.reference or version in self._directories:
            return
        if (base := reference_of(directory).name) != self.reference:
            raise SwapError(f"{version} is an adapter on {base}, but the engine has {self.reference}.")
        await check_finite(version, directory)
        # If the engine later evicts it for others, it reloads it by itself.
        try:
            await self._ask(self._engine.add_lora(request(version, directory)))
        except Exception as error:
            if not self.alive:
                raise
            raise SwapError(f"{version} could not be loaded: {error}") from error
        self._directories[version] = directory

    async def _swap(self, version: str, directory: Path) -> None:
        if (reference := reference_of(directory)) != self._reference_directory:
            await self._restart_with(reference, version, directory)
            return
        await self.keep_live(version, directory)
        self._version, self._directory = version, directory
        self._admitted.set()
        log.info("new answers come from %s", version)

    async def _restart_with(self, reference: Path, version: str, directory: Path) -> None:
        """Restart the engine with another reference, and load the version. If that cannot be, what was loaded before
        serves again."""
        # While the engine still serves: whatever is wrong with the files is found before it is stopped.
        await asyncio.to_thread(verify, reference)
        await check_finite(version, directory)
        before = self._version, self._directory, self._reference_directory, self._directories
        self._before = self._version
        try:
            self._admitted.clear()
            await self._drain()
            log.warning("restarting the engine with the reference %s", reference.name)
            self._version, self._directory, self._reference_directory = version, directory, reference
            self._directories = {}
            try:
                await self._revive()
            except Exception as error:
                self._admitted.clear()
                self._version, self._directory, self._reference_directory, self._directories = before
                await self._revive()
                raise SwapError(f"the engine could not start with {version}: {error}") from error
        finally:
            self._before = ""

    async def _drain(self) -> None:
        """Wait until the answers in progress have ended, but not for ever."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._engine.output_processor.has_unfinished_requests():
                    await asyncio.sleep(DRAIN_POLL_SECONDS)

    async def _make_spare(self) -> None:
        """Check the loaded adapters again. No spare is needed, since no weights are exchanged."""
        for version, directory in list(self._directories.items()):
            try:
                await asyncio.to_thread(verify, directory)
            except ManifestError as error:
                log.error("%s is no longer served: %s", version, error)
                del self._directories[version]

    def _adapter(self, version: str) -> Any:
        super()._adapter(version)
        return None if version == self.reference else request(version, self._directories[version])

    def _labels(self, version: str) -> Labels:
        """One span, of the version that the answer was pinned to; vLLM only knows the reference's label."""

        def pinned(labelled: list[Span]) -> list[Span]:
            return [Span(labelled[0].start, labelled[-1].end, version)] if labelled else []

        return Labels(lambda: version, pinned)


async def check_finite(version: str, directory: Path) -> None:
    """Raise SwapError for a version with a value that is not finite."""
    try:
        await asyncio.to_thread(lambda: deque(finite_tensors(directory), maxlen=0))
    except ValueError as error:
        raise SwapError(f"{version}: {error}") from error


def reference_of(directory: Path) -> Path:
    """The directory of a published version's reference: itself, if it is one."""
    return directory.parent / read_manifest(directory).reference_version


def request(version: str, directory: Path) -> Any:
    """The vLLM request for an adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(version, int(version[1:]), str(directory))
