"""The serving engine over vLLM. It handles what vLLM leaves to its caller:
- Admission. vLLM accepts requests while it is paused; here they wait outside until the swap is over.
- Labels. Every token belongs to one span of one version. vLLM labels tokens as they leave the engine; a cancelled
  answer is aborted through the engine, not by dropping its stream, because only then the last output has its spans.
- The KV cache. A swap recomputes the cache of running answers, so that no token attends to another version's keys and
  values. With `keep_kv` it does not, and every span after the swap has `stale_kv`.
- Restarts. A dead engine is restarted and serves the version that it served before.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from server.engine.base import Sampling, SwapError
from server.engine.vllm_stream import Labels, VllmAnswerStream, mark_stale
from server.engine.watchdog import Pulse, complaint
from server.engine.weights import check_weights, engine_weights
from server.shared.errors import UnavailableError
from server.shared.model.dtype import DtypeName
from server.shared.model.text import PLAIN, ChatText, embeddings
from server.store.files.manifest import verify
from server.store.ids import new_id
from server.telemetry.metrics import SWAP_SECONDS
from server.telemetry.timed import timed

log = logging.getLogger(__name__)

T = TypeVar("T")

DEAD_POLL_SECONDS = 0.2
STAGING_POLL_SECONDS = 0.02
STAGING_TIMEOUT_SECONDS = 300.0
# Upper limit for one call; the longest is the exchange of a large model's weights, including checksums.
ASK_SECONDS = 300.0
# The engine's process ends by itself within a second or two; after this it is killed.
SHUTDOWN_SECONDS = 10.0
# How long a step may take with short prompts, and thus delay streams; attention to a long one adds half as much.
STEP_SECONDS = 0.8
MEASURED_TOKENS = 256
WARM_ANSWERS = 16


class VllmEngine:
    """Engine over an AsyncLLM created by `start_engine`, which loads the reference in a directory, first `directory`,
    and computes in `dtype`. The directory has the name of the reference's version."""

    def __init__(
        self, start_engine: Callable[[Path], Any], directory: Path, dtype: DtypeName, *, keep_kv: bool = False
    ) -> None:
        self._start_engine = start_engine
        self._dtype = dtype
        self._version, self._directory, self._reference_directory = directory.name, directory, directory
        self._engine, self._pulse = self._launch()
        # Maximum tokens of a step; None before they are measured.
        self._step_tokens: int | None = None
        # When `probe` first saw the engine busy since it was last idle.
        self._working_since: float | None = None
        self._text = ChatText(self._engine.get_tokenizer(), embeddings(self._engine.model_config.hf_config))
        # The version in the worker's spare model; None if unknown.
        self._spare: str | None = None
        self._keep_kv = keep_kv
        self._admitted = asyncio.Event()
        self._swapping = asyncio.Lock()
        self._reviving = False

    @property
    def version(self) -> str:
        return self._version

    @property
    def live_versions(self) -> list[str]:
        return [self.version]

    @property
    def reference(self) -> str:
        return self._reference_directory.name

    @property
    def max_model_len(self) -> int:
        return int(self._engine.model_config.max_model_len)

    @property
    def alive(self) -> bool:
        return not (self._engine.errored or self._reviving)

    async def start(self) -> None:
        """Prepare for swaps, label the first version, and warm up, so that no user waits for slow first steps."""
        await self._prepare()
        self._admitted.set()
        await self._limit_steps(await self._measure_steps())
        await self._warm_up()

    def encode(self, messages: list[dict[str, str]], began: float) -> list[int]:
        return self._text.prompt(messages, began)

    def encode_answer(self, text: str) -> list[int]:
        return self._text.answer(text)

    def locate(self, data_dir: Path, version: str) -> Path:
        trust = self._engine.model_config.trust_remote_code
        # What it must be like is what is loaded: a version that is its own reference is always like that.
        return check_weights(engine_weights(data_dir, version, self._dtype, trust), self._reference_directory)

    async def sample(
        self, prompt_token_ids: list[int], sampling: Sampling, version: str | None = None
    ) -> VllmAnswerStream:
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
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,  # a list of floats, not a dictionary per token
                detokenize=False,  # server.shared.model.text does
                output_kind=RequestOutputKind.DELTA,
            ),
            lora_request=self._adapter(version),
        )
        text = self._text.stream(prompt_token_ids)
        return VllmAnswerStream(self._engine, request_id, queue, text, self._labels(version), sampling.stop)

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
                raise SwapError(f"the engine died while it loaded {version}, and was restarted") from error

    async def keep_live(self, version: str, directory: Path) -> None:
        raise SwapError("merged weights are served one version at a time")

    def probe(self, hang_seconds: float | None) -> str | None:
        if not self.alive:
            return None
        now = time.monotonic()
        # A swap pauses all steps, and has its own limits (`_ask`).
        if self._admitted.is_set() and self._engine.output_processor.has_unfinished_requests():
            self._working_since = self._working_since or now
        else:
            self._working_since = None
        reason = complaint(self._pulse.read(), now, self._working_since, hang_seconds)
        if reason:
            self._kill(self._engine)
        return reason

    async def revive(self) -> None:
        async with self._swapping:
            if not self.alive:
                await self._revive()

    async def close(self) -> None:
        # Also drop the reference: frames and handlers may keep this object alive longer than the engine.
        engine, self._engine = self._engine, None
        await asyncio.to_thread(engine.shutdown, SHUTDOWN_SECONDS)
        self._pulse.close()

    def _launch(self) -> tuple[Any, Pulse]:
        """A new engine, and the shared page on which its process reports its health."""
        pulse = Pulse.create()
        try:
            return self._start_engine(self._reference_directory), pulse
        except BaseException:
            pulse.close()
            raise

    async def _measure_steps(self) -> int:
        """How many tokens this machine computes in a step of STEP_SECONDS."""
        # Only the second step is measured: the first one has more to do.
        for tokens in (MEASURED_TOKENS // 4, MEASURED_TOKENS):
            await self._read([tokens], max_tokens=1)
        vitals = self._pulse.read()
        return int(vitals.step_tokens / vitals.step_seconds * STEP_SECONDS)

    async def _limit_steps(self, tokens: int) -> None:
        """Limit a step to about `tokens`: at most vLLM's own limit, and at least one for each answer."""
        scheduler = self._engine.vllm_config.scheduler_config
        self._step_tokens = max(scheduler.max_num_seqs, min(tokens, scheduler.max_num_batched_tokens))
        await self._ask(self._engine.collective_rpc("prefloop_limit_steps", args=(self._step_tokens,)))

    async def _warm_up(self) -> None:
        """Run one step of the maximum length, and one with many answers."""
        assert self._step_tokens
        await self._read([self._step_tokens], max_tokens=1)
        seconds = self._pulse.read().step_seconds
        await self._read([MEASURED_TOKENS // 32] * WARM_ANSWERS, max_tokens=2)
        log.info("a step has at most %d tokens, which took %.2f s", self._step_tokens, seconds)

    async def _read(self, lengths: list[int], max_tokens: int) -> None:
        """Sample from random prompts of these `lengths` in tokens, or as many as fit, with unique beginnings."""
        asked = [{"role": "user", "content": PLAIN}]
        words = self.encode(asked, time.time())
        longest = self.max_model_len - max_tokens
        prompts = [random.choices(words, k=min(length, longest)) for length in lengths]
        for stream in [await self.sample(prompt, Sampling(0.0, max_tokens)) for prompt in prompts]:
            async for _ in stream:
                pass

    async def _swap(self, version: str, directory: Path) -> None:
        seconds: dict[str, float] = {}
        # The spare may hold it already: an immediate rollback reads nothing.
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
        # Read and check in the worker's memory while answers continue, so that the pause is only an exchange.
        self._spare = None
        async with asyncio.timeout(STAGING_TIMEOUT_SECONDS):
            # An abandoned earlier one may still be reading.
            while False in await self._ask(self._engine.collective_rpc("prefloop_stage", args=(str(directory),))):
                await asyncio.sleep(STAGING_POLL_SECONDS)
            while None in (staged := await self._ask(self._engine.collective_rpc("prefloop_staged"))):
                await asyncio.sleep(STAGING_POLL_SECONDS)
        if reasons := [reason for reason in staged if reason]:
            raise SwapError(reasons[0])
        self._spare = version

    async def _exchange(self, version: str, directory: Path) -> None:
        # Whatever happens here, the engine ends with one complete set of weights: the worker rolls back by itself.
        # Until it has answered, the contents of the spare are unknown.
        before, self._spare = self._version, None
        wrong = await self._ask(self._engine.collective_rpc("prefloop_exchange"))
        if reasons := [reason for reason in wrong if reason]:
            raise SwapError(f"{version}: {reasons[0]}")
        self._version, self._directory, self._spare = version, directory, before
        await self._ask(self._engine.update_weight_version(version))

    async def _revive(self) -> None:
        """Restart the engine. It loads the reference; no call is admitted before it has the version that was served."""
        self._reviving = True
        try:
            await self._start_again()
        finally:
            self._reviving = False

    async def _start_again(self) -> None:
        self._admitted.clear()
        self._working_since = None
        await asyncio.to_thread(self._engine.shutdown, SHUTDOWN_SECONDS)
        log.warning("restarting the engine")
        # It was last checked when it was first read, perhaps days ago.
        await asyncio.to_thread(verify, self._reference_directory)
        await self._start_engine_whole()
        self._spare = None
        try:
            await self._prepare()
            if self._step_tokens:
                await self._limit_steps(self._step_tokens)
        except Exception:
            # Shut down what cannot serve, so that it counts as dead and is restarted.
            await asyncio.to_thread(self._engine.shutdown, SHUTDOWN_SECONDS)
            raise
        if self._version == self.reference:
            self._admitted.set()
            return
        try:
            await asyncio.to_thread(verify, self._directory)
            await self._swap(self._version, self._directory)
        except Exception:
            self._version, self._directory = self.reference, self._reference_directory
            self._admitted.set()
            raise
        self._spare = self.reference

    async def _start_engine_whole(self) -> None:
        """Start an engine on a thread; a cancellation waits for it, so that no engine is left without an owner."""
        starting, before = asyncio.create_task(asyncio.to_thread(self._launch)), self._pulse
        try:
            self._engine, self._pulse = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._engine, self._pulse = await starting
            raise
        finally:
            if self._pulse is not before:
                before.close()

    async def _prepare(self) -> None:
        await self._ask(self._engine.collective_rpc("prefloop_keep_seeds"))
        await self._make_spare()
        await self._ask(self._engine.update_weight_version(self.reference))

    async def _make_spare(self) -> None:
        await self._ask(self._engine.collective_rpc("prefloop_prepare"))

    async def _ask(self, call: Coroutine[Any, Any, T]) -> T:
        """The engine's answer to a call. Raises RuntimeError if the engine is dead, which leaves calls unanswered, or
        hangs, in which case it is killed."""
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
        """Kill the engine's processes. vLLM notices this by itself, and ends the calls that wait for it."""
        for process in engine.engine_core.resources.engine_manager.processes:
            process.kill()

    def _adapter(self, version: str) -> Any:
        """The vLLM adapter for a request's `version`; merged weights need none. Raises UnavailableError."""
        if version not in self.live_versions:
            # It was when the answer was asked for, and the answer waited while another was loaded.
            raise UnavailableError(f"{version} is not loaded any more; {self.version} is.")

    def _labels(self, version: str) -> Labels:
        return Labels(lambda: self._version, mark_stale if self._keep_kv else list)
