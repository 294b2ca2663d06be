"""How many durable votes per second are acknowledged, and their effect on users who chat.

    python benchmarks/votes.py [MODEL] [--work-dir DIR] [--clients 64] [--seconds 5] [--write]

The server runs as an operator starts it, with a real engine, keys and every check; only the rate limit per user is
lifted. 64 clients, each a user with a separate key and connection, change their thumb on an answer as fast as it is
acknowledged. In the same run, alternating with this, two baselines are measured: an empty gRPC handler with the same
clients and message (echo), and this disk's commits per second of one row by one writer. Afterwards the store must have
exactly the acknowledged votes. Then four clients chat, alone and during votes at full speed and at 200 votes per
second. Medians of three turns. Prints one JSON line last.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pysqlite3.dbapi2 as sqlite3
import uvloop
from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2, feedback_pb2_grpc

from clients.client import Client
from clients.demo.processes import Server
from server.store.store import Store

REPEATS = 3
CHATTERS, TOKENS = 4, 100
MODEST = 200
# Answers that each voter votes on in turn.
ANSWERS = 8
LIMIT_SECONDS = 300
ECHO = "/echo/Echo"
QUESTION = "Write a long story about a lighthouse and the people who live near it."
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "votes.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "prefloop-bench-votes")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        uvloop.run(serve_echo())
    elif arguments.load:
        uvloop.run(load(**json.loads(arguments.load)))
    else:
        figures = measure(arguments.model, arguments.work_dir, arguments.clients, arguments.seconds)
        if arguments.write:
            REPORT.write_text(report(figures))
        print(json.dumps({"benchmark": "votes", **figures}))


def measure(model: str, work: Path, clients: int, seconds: float) -> dict[str, Any]:
    data = work / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    with closing(Store.open(data)) as store:
        keys = [store.keys.create(f"voter{number}", "user") for number in range(clients)]
        chatter = store.keys.create("chatter", "user")
    os.environ["PREFLOOP_USER_RATE"] = "1000000"
    with Server(data, model, say) as server, echo_server() as echo:
        server.start()
        turns: list[dict[str, float]] = []
        acknowledged = 0.0
        for turn in range(REPEATS):
            say(f"turn {turn + 1} of {REPEATS}")
            votes = run_load(server.address, keys, seconds)
            acknowledged += votes["calls"]
            empty = run_load(echo, keys, seconds, echo=True)
            turns.append({
                "votes_per_s": votes["calls"] / votes["seconds"], "votes_p50_ms": votes["p50_ms"],
                "votes_p99_ms": votes["p99_ms"], "echo_per_s": empty["calls"] / empty["seconds"],
                "echo_p99_ms": empty["p99_ms"], "commits_per_s": commits(data, seconds / 2),
            })  # fmt: skip
            say(json.dumps(turns[-1]))
        figures: dict[str, Any] = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        figures["of_echo"] = statistics.median(turn["votes_per_s"] / turn["echo_per_s"] for turn in turns)
        with closing(Store.open(data)) as store:
            figures |= {"acknowledged": int(acknowledged), "in_the_store": store.snapshots.watermark()}
        figures["chat"] = {
            "alone": chat(server.address, chatter, nothing),
            "beside_votes": chat(server.address, chatter, lambda: background(server.address, keys, 0.0)),
            "beside_some": chat(server.address, chatter, lambda: background(server.address, keys, MODEST)),
        }
    if figures["acknowledged"] != figures["in_the_store"]:
        sys.exit(f"{figures['acknowledged']} votes were acknowledged, {figures['in_the_store']} are in the store")
    return figures


def commits(directory: Path, seconds: float) -> float:
    """Commits per second of one row each, with the store's modes: WAL and FULL."""
    path = directory / "commits.db"
    with closing(sqlite3.connect(str(path), isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY, text TEXT)")
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO rows (text) VALUES (?)", ["x" * 100])
            db.execute("COMMIT")
            done += 1
    path.unlink()
    return done / seconds


# Chatting clients


def chat(address: str, key: str, beside: Callable[[], Any]) -> dict[str, float]:
    """Time to first text and tokens per second of four clients, three answers each, during `beside`."""
    first: list[float] = []
    tokens = 0
    counting = threading.Lock()

    def talk() -> None:
        nonlocal tokens
        with Client(address, api_key=key) as client:
            for _ in range(3):
                asked, heard = time.perf_counter(), 0.0
                for event in client.chat(QUESTION, max_tokens=TOKENS):
                    if isinstance(event, chat_pb2.ChatDelta) and not heard:
                        heard = time.perf_counter() - asked
                    if isinstance(event, chat_pb2.ChatFinished):
                        with counting:
                            first.append(heard)
                            tokens += event.usage.completion_tokens

    with beside():
        started = time.perf_counter()
        threads = [threading.Thread(target=talk) for _ in range(CHATTERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_SECONDS)
        seconds = time.perf_counter() - started
    return {
        "first_text_ms": 1000 * statistics.median(first),
        "first_text_max_ms": 1000 * max(first),
        "tokens_per_s": tokens / seconds,
    }


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def background(address: str, keys: list[str], rate: float) -> Iterator[None]:
    """Votes during the block, at full speed or at `rate` per second."""
    voters = start_load(address, keys, LIMIT_SECONDS, rate=rate)
    assert voters.stdout
    voters.stdout.readline()
    try:
        yield
    finally:
        voters.terminate()
        voters.wait(LIMIT_SECONDS)


# Voting clients, in a separate process


def run_load(address: str, keys: list[str], seconds: float, *, echo: bool = False) -> dict[str, float]:
    voters = start_load(address, keys, seconds, echo=echo)
    out, _ = voters.communicate(timeout=LIMIT_SECONDS)
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    return figures


def start_load(
    address: str, keys: list[str], seconds: float, *, echo: bool = False, rate: float = 0.0
) -> "subprocess.Popen[str]":
    what = json.dumps({"address": address, "keys": keys, "seconds": seconds, "echo": echo, "rate": rate})
    return subprocess.Popen([sys.executable, __file__, "--load", what], stdout=subprocess.PIPE, text=True)


async def load(address: str, keys: list[str], seconds: float, echo: bool, rate: float) -> None:
    """Each key's user calls again as soon as the last call is acknowledged, or at a total of `rate` per second."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in keys]
    calls = await asyncio.gather(*(voter(*pair, echo) for pair in zip(channels, keys, strict=True)))
    print("ready", flush=True)
    took: list[float] = []
    started = time.perf_counter()

    async def again(call: Callable[[int], Awaitable[Any]]) -> None:
        number = 0
        while (now := time.perf_counter()) < started + seconds:
            await call(number)
            number += 1
            took.append(time.perf_counter() - now)
            if rate:
                await asyncio.sleep(len(keys) / rate)

    await asyncio.gather(*map(again, calls))
    elapsed = time.perf_counter() - started
    took.sort()
    figures = {
        "calls": len(took), "seconds": elapsed,
        "p50_ms": 1000 * took[len(took) // 2], "p99_ms": 1000 * took[int(len(took) * 0.99)],
    }  # fmt: skip
    print(json.dumps(figures))
    await asyncio.gather(*(channel.close() for channel in channels))


async def voter(channel: grpc.aio.Channel, key: str, echo: bool) -> Callable[[int], Awaitable[Any]]:
    """A function that casts one vote, or calls the echo with a message of the same size."""
    metadata = (("authorization", f"Bearer {key}"),)

    def vote(response_id: str, number: int) -> Any:
        thumb = feedback_pb2.THUMB_UP if number // ANSWERS % 2 else feedback_pb2.THUMB_DOWN
        return feedback_pb2.SubmitThumbRequest(response_id=response_id, thumb=thumb, request_id=str(uuid.uuid4()))

    if echo:
        method: Any = channel.unary_unary(ECHO)
        return lambda number: method(vote("resp_" + "0" * 24, number).SerializeToString(), metadata=metadata)
    chat: Any = chat_pb2_grpc.ChatServiceStub(channel)
    request = chat_pb2.ChatRequest(message="Hi", sampling=chat_pb2.SamplingOptions(max_tokens=1))
    # Several answers, since a thumb can be changed only a thousand times.
    answers = [[event async for event in chat.Chat(request, metadata=metadata)] for _ in range(ANSWERS)]
    ids = itertools.cycle([started.started.response_id for started, *_ in answers])
    feedback: Any = feedback_pb2_grpc.FeedbackServiceStub(channel)
    return lambda number: feedback.SubmitThumb(vote(next(ids), number), metadata=metadata)


# The echo server, in a separate process


class Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def echo(request: bytes, context: Any) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(echo)


async def serve_echo() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


@contextmanager
def echo_server() -> Iterator[str]:
    running = subprocess.Popen([sys.executable, __file__, "--echo"], stdout=subprocess.PIPE, text=True)
    assert running.stdout
    try:
        yield running.stdout.readline().strip()
    finally:
        running.terminate()
        running.wait(LIMIT_SECONDS)


def report(figures: dict[str, Any]) -> str:
    f, rows = figures, []
    for name, key in (
        ("alone", "alone"),
        (f"beside {MODEST} votes/s", "beside_some"),
        ("beside all votes that go", "beside_votes"),
    ):
        one = f["chat"][key]
        rows.append(
            f"| {name} | {one['first_text_ms']:.0f} | {one['first_text_max_ms']:.0f} | {one['tokens_per_s']:.0f} |"
        )
    return f"""# Votes

`python benchmarks/votes.py MODEL --work-dir DIR --write` on two cores: 64 clients with a key and a connection each
change their thumb as fast as it is acknowledged, alternating with an empty handler and with this disk's commits.
Medians of three turns of 5 s. Server, clients and SQLite share the cores. {f["acknowledged"]} votes were acknowledged,
and the store has {f["in_the_store"]}.

| | per second | 50 % ms | 99 % ms |
| --- | --- | --- | --- |
| durable votes | {f["votes_per_s"]:.0f} | {f["votes_p50_ms"]:.1f} | {f["votes_p99_ms"]:.1f} |
| empty handler | {f["echo_per_s"]:.0f} | | {f["echo_p99_ms"]:.1f} |
| commits of one row, one writer | {f["commits_per_s"]:.0f} | | |

Votes reach {f["of_echo"]:.2f} of the empty handler's rate.

Four clients that chat ({TOKENS} tokens per answer):

| | first text ms | slowest ms | tokens/s |
| --- | --- | --- | --- |
{chr(10).join(rows)}
"""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
