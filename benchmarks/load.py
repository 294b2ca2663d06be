"""The client side of `benchmarks/serve.py`, as a separate process: `python benchmarks/load.py grpc ADDRESS`.

Reads one load per line from standard input, as JSON {"streams", "waves", "tokens", "temperature", "logprobs", "seed"},
and answers each with one JSON line: {"tokens", "answers", "deltas", "seconds", "ttft_s", "gap_p99_s", "cpu_s"}. A wave
is `streams` questions sent at once; the next one starts when all are answered. Times are in seconds.

Targets: `grpc ADDRESS` (prefloop), `openai ADDRESS` (vLLM's OpenAI server), `gateway ADDRESS` (the same client against
prefloop's gateway, which stores log-probabilities but does not send them), `bare DIRECTORY` (vLLM's AsyncLLM in this
process with pre-tokenised prompts, so without any front end).
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from clients.demo.questions import questions

READY = "ready"
# Asks one question, calls `heard` at every delta, and returns the answer's number of tokens.
Ask = Callable[[str, Callable[[], None]], Awaitable[int]]


@dataclass(frozen=True)
class Load:
    """One measurement. `logprobs`: ask for those of the chosen tokens, if the client decides that. `seed` selects the
    questions; sampling is not seeded, because a seed per request makes the engine sample each row separately.
    """

    streams: int
    waves: int
    tokens: int
    temperature: float
    logprobs: bool
    seed: int


async def main(target: str, address: str) -> None:
    """Connects, reports that it is ready, and runs loads until standard input ends."""
    # vLLM's processes print to standard output, so that is redirected to standard error and replies use a copy.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    open_target = TARGETS[target]
    async with asyncio.timeout(300):
        ask, close = await open_target(address)
    print(READY, file=replies)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await measure(ask, Load(**json.loads(line)))), file=replies)
    finally:
        await close()


async def measure(ask: Callable[[Load], Ask], load: Load) -> dict[str, float]:
    """Runs one load."""
    asked = questions(load.seed)
    answer = ask(load)
    times: list[list[float]] = []
    tokens, started, cpu = 0, time.perf_counter(), time.process_time()
    for wave in range(load.waves):
        runs = []
        for stream in range(load.streams):
            number = wave * load.streams + stream
            heard = [time.perf_counter()]
            times.append(heard)
            question = asked[number % len(asked)]
            runs.append(answer(question, lambda heard=heard: _now(heard)))  # type: ignore[misc]
        tokens += sum(await asyncio.gather(*runs))
    seconds = time.perf_counter() - started
    gaps = sorted(later - earlier for heard in times for earlier, later in itertools.pairwise(heard[1:]))
    return {
        "tokens": tokens,
        "answers": len(times),
        "deltas": sum(len(heard) - 1 for heard in times),
        "seconds": seconds,
        "ttft_s": statistics.median(heard[1] - heard[0] for heard in times),
        "gap_p99_s": gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "cpu_s": time.process_time() - cpu,
    }


def _now(heard: list[float]) -> None:
    heard.append(time.perf_counter())


Target = tuple[Callable[[Load], Ask], Callable[[], Awaitable[None]]]


async def grpc_target(address: str) -> Target:
    """prefloop's own API. The server always computes and stores log-probabilities."""
    import grpc
    from prefloop.v1.chat_pb2 import ChatRequest, SamplingOptions
    from prefloop.v1.chat_pb2_grpc import ChatServiceStub

    channel = grpc.aio.insecure_channel(address)
    stub = ChatServiceStub(channel)

    def ask(load: Load) -> Ask:
        async def answer(question: str, heard: Callable[[], None]) -> int:
            sampling = SamplingOptions(temperature=load.temperature, max_tokens=load.tokens)
            tokens = 0
            async for event in stub.Chat(ChatRequest(message=question, sampling=sampling)):
                if event.HasField("delta"):
                    heard()
                elif event.HasField("finished"):
                    tokens = event.finished.usage.completion_tokens
            return tokens

        return answer

    async def close() -> None:
        await channel.close()

    return ask, close


async def openai_target(address: str, model: str = "bench", may_ask_logprobs: bool = True) -> Target:
    """Streamed chat completions over HTTP with aiohttp, a lighter client than OpenAI's own library."""
    import aiohttp

    # No limits on connections or a stream's duration. The server drops idle connections after 5 s, so we do so first.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
    url = f"http://{address}/v1/chat/completions"

    def ask(load: Load) -> Ask:
        async def answer(question: str, heard: Callable[[], None]) -> int:
            body: dict[str, Any] = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": load.tokens,
                "temperature": load.temperature,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if load.logprobs and may_ask_logprobs:
                body |= {"logprobs": True, "top_logprobs": 0}
            tokens = 0
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                        heard()
                    if chunk.get("usage"):
                        tokens = chunk["usage"]["completion_tokens"]
            return tokens

        return answer

    return ask, session.close


async def gateway_target(address: str) -> Target:
    return await openai_target(address, "prefloop", may_ask_logprobs=False)


async def bare_target(directory: str) -> Target:
    """The engine alone, created with the server's own arguments."""
    from server.engine.vllm_start import set_environment, start_engine
    from server.settings import ServerSettings
    from server.shared.model.dtype import resolve_dtype

    settings = ServerSettings()
    set_environment(settings)
    engine = start_engine(settings, resolve_dtype(settings.dtype).name, Path(directory))
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    tokenizer = engine.get_tokenizer()
    prompts = {
        question: tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions(0)
    }

    def ask(load: Load) -> Ask:
        async def answer(question: str, heard: Callable[[], None]) -> int:
            sampling = SamplingParams(
                temperature=load.temperature,
                max_tokens=load.tokens,
                logprobs=0 if load.logprobs else None,
                output_kind=RequestOutputKind.DELTA,
            )
            tokens = 0
            prompt = {"prompt_token_ids": prompts[question]}
            async for output in engine.generate(prompt, sampling, f"bench-{random.getrandbits(64):x}"):
                tokens += len(output.outputs[0].token_ids)
                if output.outputs[0].text:
                    heard()
            return tokens

        return answer

    async def close() -> None:
        await asyncio.to_thread(engine.shutdown)

    return ask, close


TARGETS = {"grpc": grpc_target, "openai": openai_target, "gateway": gateway_target, "bare": bare_target}


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2]))
