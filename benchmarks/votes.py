"""How many durable votes per second are acknowledged, and their effect on users who chat.

    python benchmarks/votes.py [MODEL] [--work-dir DIR] [--clients 64] [--seconds 5] [--write]

Servers without an engine run as an operator starts them, with keys and every check; only the rate limit per user is
lifted. One process, then two that share a port; with SQLite, then with PostgreSQL, whose data is in memory if there is
room. 64 clients, each a user with a separate key and connection, vote on one answer after another as fast as each vote
is acknowledged. In the same run, alternating with this: an empty gRPC handler with the same clients and message
(echo), in one process and in two, and this disk's commits per second of one row by one writer. Afterwards the stores
must have exactly the acknowledged votes. Then four clients chat with a server that has an engine, alone and during
votes at full speed and at 200 votes per second. Medians of three turns. Prints one JSON line last.
"""

import argparse
import json
import os
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pysqlite3.dbapi2 as sqlite3
from prefloop.v1 import chat_pb2
from vote_load import ANSWERS, LIMIT_SECONDS, Voter, echo_servers, make_voters, run_load, start_load

from clients.client import Client
from clients.demo.processes import READY, Process, Server
from server.store.store import Store
from tests.postgres import postgres_server

REPEATS = 3
CHATTERS, TOKENS = 4, 100
MODEST = 200
QUESTION = "Write a long story about a lighthouse and the people who live near it."
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "votes.md"
STORES = ("SQLite", "PostgreSQL")
PROCESSES = (1, 2)
# Answers of each voter in one run.
PART = ANSWERS // (REPEATS * len(PROCESSES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "prefloop-bench-votes")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.work_dir, arguments.clients, arguments.seconds)
    if arguments.write:
        REPORT.write_text(report(figures))
    print(json.dumps({"benchmark": "votes", **figures}))


def measure(model: str, work: Path, clients: int, seconds: float) -> dict[str, Any]:
    shutil.rmtree(work, ignore_errors=True)
    os.environ |= {"PREFLOOP_USER_RATE": "1000000", "PREFLOOP_METRICS_PORT": "0"}
    data = work / "SQLite"
    data.mkdir(parents=True)
    with closing(Store.open(data)) as store:
        voters = make_voters(store, clients)
        chatter = store.keys.create("chatter", "user")
    with Server(data, model, say) as server:
        # It prepares the model, which the others only read.
        server.start()
        figures: dict[str, Any] = {"chat": {
            "alone": chat(server.address, chatter, nothing),
            "beside_votes": chat(server.address, chatter, lambda: background(server.address, voters, 0.0)),
            "beside_some": chat(server.address, chatter, lambda: background(server.address, voters, MODEST)),
        }}  # fmt: skip
    figures["rates"] = rates(work, model, clients, seconds)
    for name in STORES:
        found = figures["rates"][name]
        if found["acknowledged"] != found["in_the_store"]:
            sys.exit(f"{name}: {found['acknowledged']} votes were acknowledged, {found['in_the_store']} are stored")
    return figures


def rates(work: Path, model: str, clients: int, seconds: float) -> dict[str, Any]:
    """Votes and calls per second by what was called: a store's name and a number of processes, or `echo`."""
    turns: dict[str, list[dict[str, float]]] = {}
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server())
        urls = {"SQLite": "", "PostgreSQL": postgres.create()}
        before, voters, targets = {}, {}, {}
        for name, url in urls.items():
            data = work / name
            if name != "SQLite":
                shutil.copytree(work / "SQLite" / "policies", data / "policies")
            with using(url), closing(Store.open(data)) as store:
                if name != "SQLite":
                    store.policies.register_reference()
                voters[name] = make_voters(store, clients, f"{name}-")
                before[name] = store.snapshots.watermark()
            for count in PROCESSES:
                address, ids = stack.enter_context(vote_servers(data, url, model, count))
                ids += [postgres.pid] if url else []
                targets[f"{name} {count}"] = address, ids, voters[name], False
        for count in PROCESSES:
            address, ids = stack.enter_context(echo_servers(count))
            targets[f"echo {count}"] = address, ids, voters["SQLite"], True
        for turn in range(REPEATS):
            say(f"turn {turn + 1} of {REPEATS}")
            for what, (address, ids, everybody, echo) in targets.items():
                # Each run is about answers without a vote.
                run = turn * len(PROCESSES) + (int(what[-1]) - 1)
                people = [(key, answers[run * PART : (run + 1) * PART]) for key, answers in everybody]
                used = [cpu_seconds(pid) for pid in ids]
                found = run_load(address, people, seconds, echo=echo)
                cores = [(cpu_seconds(pid) - was) / found["seconds"] for pid, was in zip(ids, used, strict=True)]
                found |= {"per_s": found["calls"] / found["seconds"]} | {
                    f"cores_{n}": one for n, one in enumerate(cores)
                }
                found["clients_cores"] = found.pop("cpu_s") / found["seconds"]
                turns.setdefault(what, []).append(found)
                say(f"{what}: {json.dumps({name: round(value, 2) for name, value in found.items()})}")
            turns.setdefault("commits", []).append({"per_s": commits(work, seconds / 2)})
        figures |= {
            what: {name: statistics.median(turn[name] for turn in those) for name in those[0]}
            for what, those in turns.items()
        }
        for name, url in urls.items():
            with using(url), closing(Store.open(work / name)) as store:
                acknowledged = sum(int(turn["calls"]) for count in PROCESSES for turn in turns[f"{name} {count}"])
                stored = store.snapshots.watermark() - before[name]
                figures[name] = {"acknowledged": acknowledged, "in_the_store": stored}
    return figures


@contextmanager
def vote_servers(data: Path, url: str, model: str, count: int) -> Iterator[tuple[str, list[int]]]:
    """Servers without an engine that share a port; yields the address and the processes' ids."""
    command = ["server.cli", "serve", "--no-engine", "--data-dir", str(data), "--model", model]
    environment = {"PREFLOOP_SHARE_PORT": "true", "PREFLOOP_STORE_URL": url}
    with ExitStack() as stack:
        address, ids = "127.0.0.1:0", []
        for number in range(count):
            heard: queue.SimpleQueue[str] = queue.SimpleQueue()
            port = address.rpartition(":")[2]
            log = data / f"votes-{count}-{number}.log"
            process = Process([*command, "--port", port], log, heard.put, environment)
            stack.callback(process.stop)
            while not (ready := READY.match(heard.get(timeout=LIMIT_SECONDS))):
                pass
            address = ready[1]
            ids.append(process.pid)
        yield address, ids


@contextmanager
def using(url: str) -> Iterator[None]:
    """Open stores there during the block."""
    os.environ["PREFLOOP_STORE_URL"] = url
    try:
        yield
    finally:
        del os.environ["PREFLOOP_STORE_URL"]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children so far."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


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
def background(address: str, voters: list[Voter], rate: float) -> Iterator[None]:
    """Votes during the block, at full speed or at `rate` per second."""
    clients = start_load(address, voters, LIMIT_SECONDS, rate=rate)
    assert clients.stdout
    clients.stdout.readline()
    try:
        yield
    finally:
        clients.terminate()
        clients.wait(LIMIT_SECONDS)


def report(figures: dict[str, Any]) -> str:
    """The page in docs/benchmarks."""
    found, rows = figures["rates"], []
    for name in (*STORES, "echo"):
        for count in PROCESSES:
            one = found[f"{name} {count}"]
            what = f"votes, {name}" if name != "echo" else "empty handler"
            cores = ", ".join(f"{one[f'cores_{number}']:.2f}" for number in range(count))
            database = f"{one[f'cores_{count}']:.2f}" if name == "PostgreSQL" else ""
            rows.append(
                f"| {what} | {count} | {one['per_s']:.0f} | {one['per_s'] / found[f'echo {count}']['per_s']:.2f} "
                f"| {one['p50_ms']:.1f} | {one['p99_ms']:.1f} | {cores} | {database} | {one['clients_cores']:.2f} |"
            )
    chats = [
        f"| {name} | {one['first_text_ms']:.0f} | {one['first_text_max_ms']:.0f} | {one['tokens_per_s']:.0f} |"
        for name, one in (
            ("alone", figures["chat"]["alone"]),
            (f"beside {MODEST} votes/s", figures["chat"]["beside_some"]),
            ("beside all votes that go", figures["chat"]["beside_votes"]),
        )
    ]
    kept = "\n".join(
        f"With {name} {found[name]['acknowledged']} votes were acknowledged, and the store has "
        f"{found[name]['in_the_store']} of them."
        for name in STORES
    )
    return f"""# Votes

`python benchmarks/votes.py MODEL --work-dir DIR --write` on two cores: 64 clients with a key and a connection each vote
as fast as each vote is acknowledged, through servers without an engine: one, or two that share a port. Alternating with
an empty handler and with this disk's commits ({found["commits"]["per_s"]:.0f} a second of one row by one writer).
Medians of three turns of 5 s. Servers, clients and databases share the cores; PostgreSQL's data is in memory.
{kept}

| | processes | per second | of the empty handler | 50 % ms | 99 % ms | cores of each | PostgreSQL's | clients' |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Four clients that chat ({TOKENS} tokens per answer) with one server that has an engine, and takes the votes too, in
SQLite:

| | first text ms | slowest ms | tokens/s |
| --- | --- | --- | --- |
{chr(10).join(chats)}
"""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
