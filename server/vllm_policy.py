"""The policy over vLLM. It guards what vLLM leaves to its caller:
- Admission. vLLM accepts requests while it is paused; here they wait outside until the swap is over.
- Labels. Every token belongs to one span of one version. vLLM labels tokens as they leave the engine; a cancelled
  answer is aborted through the engine, not by dropping its stream, because only then the last output has its spans.
- The KV cache. A swap recomputes the cache of running answers, so that no token attends to another version's keys and
  values. With `keep_kv` it does not, and every span after the swap says `stale_kv`.
- Its end. An engine that died is started again and serves what it served before.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from server.detokenizer import Detokenizer
from server.ids import new_id
from server.metrics import SWAP_SECONDS
from server.policy import Sampling, SwapError
from server.records import Span
from server.registry import REFERENCE
from server.shared.dtype import DtypeName
from server.vllm_stream import Labels, VllmStream
from server.weights import engine_weights

log = logging.getLogger(__name__)

T = TypeVar("T")

DEAD_POLL_SECONDS = 0.2
STAGING_POLL_SECONDS = 0.02
STAGING_TIMEOUT_SECONDS = 300.0
# The longest that one call takes: the exchange of a large model's weights, sums and all.
ASK_SECONDS = 300.0
# The engine's process ends by itself within a second or two; past this it is killed.
SHUTDOWN_SECONDS = 10.0


class VllmPolicy:
    """Policy over an AsyncLLM that `start_engine` makes: it holds the reference, whose weights are in `directory`, and
    computes in `dtype`."""

    def __init__(
        self, start_engine: Callable[[], Any], directory: Path, dtype: DtypeName, *, keep_kv: bool = False
    ) -> None:
        self._start_engine = start_engine
        self._dtype = dtype
        self._engine = start_engine()
        self._tokenizer = self._engine.get_tokenizer()
        self._backend = self._tokenizer.backend_tokenizer
        self._version, self._directory, self._reference = REFERENCE, directory, directory
        # What the worker's spare model holds; None where that is not known.
        self._spare: str | None = None
        self._keep_kv = keep_kv
        self._admitted = asyncio.Event()
        self._swapping = asyncio.Lock()
        self._reviving = False

    @property
    def version(self) -> str:
        return self._version

    @property
    def max_model_len(self) -> int:
        return int(self._engine.model_config.max_model_len)

    @property
    def alive(self) -> bool:
        return not (self._engine.errored or self._reviving)

    async def start(self) -> None:
        """Makes ready for swaps, labels the first version and samples one token, so that no user waits for warm-up."""
        await self._prepare()
        self._admitted.set()
        stream = await self.sample(self.encode([{"role": "user", "content": "Hello"}]), Sampling(0.0, 1))
        async for _ in stream:
            pass

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return [int(token) for token in ids]

    def locate(self, data_dir: Path, version: str) -> Path:
        return engine_weights(data_dir, version, self._dtype)

    async def sample(self, prompt_token_ids: list[int], sampling: Sampling, version: str | None = None) -> VllmStream:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        await self._admitted.wait()
        version = version or self._version
        request_id = new_id("req")
        queue = await self._engine.add_request(
            request_id,
            tokens_input(prompt_token_ids),
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
                logprobs=0,  # of the sampled token alone
                flat_logprobs=True,  # a list of floats, not a dictionary a token
                detokenize=False,  # server.detokenizer does
                output_kind=RequestOutputKind.DELTA,
            ),
            lora_request=self._adapter(version),
        )
        detokenizer = Detokenizer(self._backend, prompt_token_ids)
        return VllmStream(self._engine, request_id, queue, detokenizer, self._labels(version))

    async def swap(self, version: str, directory: Path) -> None:
        async with self._swapping:
            try:
                await self._swap(version, directory)
            except SwapError:
                raise
            except Exception as error:
                if self.alive:
                    raise SwapError(f"{version} could not be applied: {error}") from error
                log.exception("the engine died while it loaded %s", version)
                await self._revive()
                raise SwapError(f"the engine died while it loaded {version}, and was started again") from error

    async def keep_live(self, version: str, directory: Path) -> None:
        raise SwapError("merged weights are served one version at a time")

    async def probe(self, seconds: float) -> bool:
        engine = self._engine
        try:
            async with asyncio.timeout(seconds):
                # An exchange of large models takes longer, and has its own limit (`_ask`).
                await self._admitted.wait()
                await self._ask(engine.collective_rpc("prefloop_ping"))
        except TimeoutError:
            if not self._admitted.is_set():
                return True
            self._kill(engine)
            return False
        except Exception:
            # It died of something else meanwhile.
            if self.alive:
                raise
        return True

    async def revive(self) -> None:
        async with self._swapping:
            if not self.alive:
                await self._revive()

    async def close(self) -> None:
        # Let go of it as well: frames and handlers may hold this object longer than the engine may live.
        engine, self._engine = self._engine, None
        await asyncio.to_thread(engine.shutdown, SHUTDOWN_SECONDS)

    async def _swap(self, version: str, directory: Path) -> None:
        seconds: dict[str, float] = {}
        # The spare may hold it already: going back at once reads nothing.
        if version != self._spare:
            with timed(seconds, "staging"):
                await self._stage(version, directory)
        self._admitted.clear()
        try:
            try:
                with timed(seconds, "pause"):
                    await self._ask(self._engine.pause_generation(mode="keep", clear_cache=not self._keep_kv))
                with timed(seconds, "exchange"):
                    await self._exchange(version, directory)
            finally:
                with timed(seconds, "resume"):
                    await self._ask(self._engine.resume_generation())
        finally:
            self._admitted.set()
        seconds["gap"] = sum(seconds[stage] for stage in ("pause", "exchange", "resume"))
        for stage, took in seconds.items():
            SWAP_SECONDS.labels(stage).observe(took)
        log.info("swapped to %s: %s", version, ", ".join(f"{name} {took:.3f} s" for name, took in seconds.items()))

    async def _stage(self, version: str, directory: Path) -> None:
        # Read and checked in the worker's memory while answers go on: the pause is an exchange and nothing else.
        self._spare = None
        async with asyncio.timeout(STAGING_TIMEOUT_SECONDS):
            # One that was given up may still be reading.
            while False in await self._ask(self._engine.collective_rpc("prefloop_stage", args=(str(directory),))):
                await asyncio.sleep(STAGING_POLL_SECONDS)
            while None in (staged := await self._ask(self._engine.collective_rpc("prefloop_staged"))):
                await asyncio.sleep(STAGING_POLL_SECONDS)
        if reasons := [reason for reason in staged if reason]:
            raise SwapError(reasons[0])
        self._spare = version

    async def _exchange(self, version: str, directory: Path) -> None:
        # Whatever happens here, the engine ends with one whole set of weights: the worker goes back by itself. Until it
        # has answered, nobody knows what the spare has.
        before, self._spare = self._version, None
        wrong = await self._ask(self._engine.collective_rpc("prefloop_exchange"))
        if reasons := [reason for reason in wrong if reason]:
            raise SwapError(f"{version}: {reasons[0]}")
        self._version, self._directory, self._spare = version, directory, before
        await self._ask(self._engine.update_weight_version(version))

    async def _revive(self) -> None:
        """A new engine has the reference; nobody is let in before it has what was served."""
        self._reviving = True
        try:
            await self._start_again()
        finally:
            self._reviving = False

    async def _start_again(self) -> None:
        self._admitted.clear()
        await asyncio.to_thread(self._engine.shutdown, SHUTDOWN_SECONDS)
        log.warning("starting the engine again")
        await self._start_engine_whole()
        self._spare = None
        try:
            await self._prepare()
        except Exception:
            # Not fit to serve: dead, so that it is tried again.
            await asyncio.to_thread(self._engine.shutdown, SHUTDOWN_SECONDS)
            raise
        if self._version == REFERENCE:
            self._admitted.set()
            return
        try:
            await self._swap(self._version, self._directory)
        except Exception:
            self._version, self._directory = REFERENCE, self._reference
            self._admitted.set()
            raise
        self._spare = REFERENCE

    async def _start_engine_whole(self) -> None:
        """A stop must not leave an engine to nobody, which a thread goes on to start."""
        starting = asyncio.create_task(asyncio.to_thread(self._start_engine))
        try:
            self._engine = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._engine = await starting
            raise

    async def _prepare(self) -> None:
        await self._ask(self._engine.collective_rpc("prefloop_prepare"))
        await self._ask(self._engine.update_weight_version(REFERENCE))

    async def _ask(self, call: Coroutine[Any, Any, T]) -> T:
        """What the engine answers. A dead one leaves such calls unanswered: raises RuntimeError then. One that hangs is
        killed first."""
        engine, answering = self._engine, asyncio.create_task(call)
        patience = time.monotonic() + ASK_SECONDS
        try:
            while not (await asyncio.wait([answering], timeout=DEAD_POLL_SECONDS))[0]:
                if engine.errored:
                    raise RuntimeError("the engine died")
                if time.monotonic() > patience:
                    self._kill(engine)
                    raise RuntimeError("the engine hung")
            return answering.result()
        finally:
            answering.cancel()

    def _kill(self, engine: Any) -> None:
        """Of an engine that is dead vLLM takes notice by itself, and ends what waits for it."""
        for process in engine.engine_core.resources.engine_manager.processes:
            process.kill()

    def _adapter(self, version: str) -> Any:
        """What of vLLM's makes a request's answer come from `version`."""
        if version != self._version:
            raise ValueError(f"{version} is not loaded, {self._version} is")

    def _labels(self, version: str) -> Labels:
        return Labels(lambda: self._version, self._mark)

    def _mark(self, labelled: list[Span]) -> list[Span]:
        """Marks every span but the first where a swap keeps the KV cache."""
        if not self._keep_kv:
            return labelled
        return [replace(span, stale_kv=number > 0) for number, span in enumerate(labelled)]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Keeps how long the block took, also where it fails."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - started
