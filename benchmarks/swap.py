"""The cost of a swap for running streams: a hundred swaps under sixteen streams.

    python benchmarks/swap.py MODEL --work-dir DIR [--swaps 100] [--streams 16] [--keep-kv] [--write]

The server runs as an operator starts it, compiled, with three versions: the reference and two whose last norm is a
little smaller. Sixteen clients chat without a pause while ActivatePolicy cycles through the versions, each time as soon
as every stream has had some tokens since the last swap. With three versions, none is the one that the worker still has
from the swap before. Every answer is checked in the store: it must have ended by itself, its deltas must equal its
text, and its spans must cover each of its tokens once. For each swap this measures the longest gap between two deltas
of any stream at the client, and in the server's log the durations of staging, pause, exchange and resume. The rest of
the gap is the transport of tokens and the prefill of running answers. `--write` puts the tables of both kinds of cache
into docs/benchmarks/swap.md. Prints one JSON line last.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import psutil  # type: ignore[import-untyped]
from kept import kept
from prefloop.v1 import chat_pb2, chat_pb2_grpc, policy_pb2, policy_pb2_grpc

from clients.demo.processes import Server
from server.store.store import Store
from tests.versions import make_version, scaled

TOKENS = 200
# The number of deltas that every stream gets between two swaps.
BETWEEN = 10
SECONDS = 120
SWAPPED = re.compile(r"swapped to (\S+): (.*)")
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "swap.md"
QUESTION = "Write a long story about a lighthouse and the people who live near it."


@dataclass
class Stream:
    """One answer as its client saw it."""

    conversation_id: str = ""
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    finished: Any = None
    error: str = ""


class Crowd:
    """Clients that chat one answer after another until `stop`."""

    def __init__(self, address: str, count: int) -> None:
        self.streams: list[Stream] = []
        self._chat = chat_pb2_grpc.ChatServiceStub(grpc.insecure_channel(address))
        self._stopping = threading.Event()
        self._moved = threading.Condition()
        self._deltas = [0] * count
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def wait(self, deltas: int) -> None:
        """Waits until every client has received this many more deltas."""
        with self._moved:
            goal = [count + deltas for count in self._deltas]
            done = self._moved.wait_for(lambda: all(a >= b for a, b in zip(self._deltas, goal, strict=True)), SECONDS)
        if not done:
            sys.exit("a stream stands still")

    def stop(self) -> None:
        """Lets every answer end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(SECONDS)

    def _run(self, number: int) -> None:
        while not self._stopping.is_set():
            stream = Stream()
            self.streams.append(stream)
            try:
                self._answer(number, stream)
            except grpc.RpcError as error:
                stream.error = str(error.code())
                return

    def _answer(self, number: int, stream: Stream) -> None:
        request = chat_pb2.ChatRequest(message=QUESTION, sampling=chat_pb2.SamplingOptions(max_tokens=TOKENS))
        for event in self._chat.Chat(request, timeout=SECONDS, metadata=(("x-user-id", f"user{number}"),)):
            match event.WhichOneof("event"):
                case "started":
                    stream.conversation_id = event.started.conversation_id
                case "delta":
                    stream.arrivals.append(time.monotonic())
                    stream.text += event.delta.text
                    with self._moved:
                        self._deltas[number] += 1
                        self._moved.notify_all()
                case "finished":
                    stream.finished = event.finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--keep-kv", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    results = arguments.work_dir / "results"
    path = results / f"{'kept' if arguments.keep_kv else 'recomputed'}.json"
    path.unlink(missing_ok=True)
    result = kept(path, partial(measure, arguments))
    if arguments.write:
        found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"), reverse=True)]
        REPORT.write_text(report(found))
    print(json.dumps({"benchmark": "swap", "results": result}))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    os.environ["PREFLOOP_COMPILE"] = "true"
    os.environ["PREFLOOP_KEEP_KV_ON_SWAP"] = str(arguments.keep_kv)
    data = arguments.work_dir / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    server = Server(data, arguments.model, lambda line: print(line, file=sys.stderr))
    server.start()
    with server:
        versions = [make_version(data, scaled(0.99)), make_version(data, scaled(0.98)), "v0000"]
        policies = policy_pb2_grpc.PolicyServiceStub(grpc.insecure_channel(server.address))
        crowd = Crowd(server.address, arguments.streams)
        crowd.wait(BETWEEN)
        began = time.monotonic()
        crowd.wait(5 * BETWEEN)
        usual = gaps(crowd.streams, began, time.monotonic())
        windows, memory = [], []
        for number in range(arguments.swaps):
            target = versions[number % 3]
            began = time.monotonic()
            policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version=target), timeout=SECONDS)
            returned = time.monotonic()
            crowd.wait(BETWEEN)
            windows.append((began, returned, time.monotonic()))
            memory.append(resident(data))
            if number % 10 == 9:
                print(f"{number + 1} swaps", file=sys.stderr, flush=True)
        crowd.stop()
        faults = [fault for stream in crowd.streams for fault in faults_of(stream, data)]
    splits = [split(line) for line in (data / "server.log").read_text().splitlines() if SWAPPED.search(line)]
    longest = [max(gaps(crowd.streams, began, ended)) for began, _, ended in windows]
    return {
        "cache": "kept" if arguments.keep_kv else "recomputed",
        "swaps": arguments.swaps,
        "streams": arguments.streams,
        "answers": len(crowd.streams),
        "faults": faults,
        "usual_gap": statistics.median(usual),
        "longest_gap": spread(longest),
        "rpc": spread([returned - began for began, returned, _ in windows]),
        "split": {
            name: spread([s[name] for s in splits if name in s]) for name in ("staging", "pause", "exchange", "resume")
        },
        "hands": spread([s["pause"] + s["exchange"] + s["resume"] for s in splits]),
        "memory_mib": [round(size) for size in memory[9::10]],
    }


def gaps(streams: list[Stream], began: float, ended: float) -> list[float]:
    """Seconds between successive deltas of one answer, for gaps that overlap the window."""
    return [b - a for stream in streams for a, b in pairwise(stream.arrivals) if b > began and a < ended]


def faults_of(stream: Stream, data: Path) -> list[str]:
    """Faults of an answer: failed, cut off, restarted, or a token without exactly one version."""
    if stream.error or stream.finished is None:
        return [f"failed: {stream.error or 'no end'}"]
    found = []
    if stream.finished.finish_reason not in (chat_pb2.FINISH_REASON_STOP, chat_pb2.FINISH_REASON_LENGTH):
        found.append("truncated")
    if stream.text != stream.finished.text:
        found.append("its deltas are not its text")
    with closing(Store.open(data)) as store:
        row = store._db.row("SELECT user FROM conversations WHERE id = ?", [stream.conversation_id])
        [turn] = store.conversations.turns(row["user"] if row else "", stream.conversation_id)
    spans = turn.response.spans if turn.response else []
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != stream.finished.usage.completion_tokens:
        found.append("a token without exactly one version")
    if any(a.policy_version == b.policy_version for a, b in pairwise(spans)):
        found.append("two spans of one version in a row")
    return found


def split(line: str) -> dict[str, float]:
    """Seconds by part, from a line of the server's log."""
    found = SWAPPED.search(line)
    assert found
    parts = (part.split() for part in found[2].split(", "))
    return {name: float(seconds) for name, seconds, _ in parts}


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    return {
        "median": statistics.median(ordered),
        "p95": ordered[int(0.95 * (len(ordered) - 1))],
        "max": ordered[-1],
        "count": len(values),
    }


def resident(data: Path) -> float:
    """Resident MiB of the server and its child processes."""
    total = 0.0
    for process in psutil.process_iter(["cmdline"]):
        if str(data) in (process.info["cmdline"] or []):
            family = [process, *process.children(recursive=True)]
            total += sum(member.memory_info().rss for member in family) / 2**20
    return total


def report(results: list[dict[str, Any]]) -> str:
    lines = [
        "# What a swap costs open streams",
        "",
        "Made by [`benchmarks/swap.py`](../../benchmarks/swap.py) on a machine of two cores without a GPU,",
        "SmolLM2-135M-Instruct, compiled. Seconds: median, 95th percentile, longest.",
    ]
    for result in results:
        faults = "; ".join([f"{len(result['faults'])} faults", *sorted(set(result["faults"]))])
        lines += [
            "",
            f"## KV cache {result['cache']}",
            "",
            f"{result['swaps']} swaps under {result['streams']} streams, {result['answers']} answers, {faults}. "
            f"Between swaps the median gap between two deltas is {result['usual_gap']:.3f} s. Memory of all processes "
            f"after every tenth swap: {', '.join(map(str, result['memory_mib']))} MiB.",
            "",
            "| | median | 95 % | longest | of |",
            "|---|---:|---:|---:|---:|",
        ]
        rows = {
            "longest gap of any stream": result["longest_gap"],
            "weights change hands (pause to resume)": result["hands"],
            **{f"- {name}": value for name, value in result["split"].items() if name != "staging"},
            "reading ahead, while answers go on": result["split"]["staging"],
            "ActivatePolicy, all of it": result["rpc"],
        }
        for name, row in rows.items():
            lines.append(f"| {name} | {row['median']:.3f} | {row['p95']:.3f} | {row['max']:.3f} | {row['count']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
