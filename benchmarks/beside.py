"""What a round costs the people who chat meanwhile: time to first token and tokens a second, with and without one.

    python benchmarks/beside.py MODEL --work-dir DIR [--streams 4] [--seconds 90] [--write]

Works on the pool of `benchmarks/study.py` (the same --work-dir): two hundred votes, a server on them, compiled, and
clients that chat without a pause. Phases of so many seconds each: alone, beside `learner run-once` as it is (`nice`
10), beside one that gives no way (`nice` 0), alone again. A round that is still at work at the end of its phase is
asked to stop. `--write` puts the table into docs/benchmarks/beside.md. Prints one JSON line last.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
from pool import TOKENS, Cell, make_data, make_pool
from prefloop.v1 import chat_pb2, chat_pb2_grpc

from clients.questions import questions
from clients.serving import Server

CELL = Cell("short", 200, 0.1, 0)
SECONDS = 300
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "beside.md"


class Chatters:
    """Clients that chat one short answer after the other; what each saw, with its time."""

    def __init__(self, address: str, count: int) -> None:
        self.first: list[tuple[float, float]] = []  # when asked, seconds to the first delta
        self.tokens: list[tuple[float, int]] = []  # when finished, tokens
        self.gaps: list[tuple[float, float]] = []  # when, seconds since the delta before
        self._chat = chat_pb2_grpc.ChatServiceStub(grpc.insecure_channel(address))
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(SECONDS)

    def seen(self, began: float, ended: float) -> dict[str, float]:
        """Figures of what happened in between."""
        first = sorted(seconds for at, seconds in self.first if began <= at < ended)
        gaps = sorted(seconds for at, seconds in self.gaps if began <= at < ended)
        tokens = sum(count for at, count in self.tokens if began <= at < ended)
        return {
            "first_median": statistics.median(first),
            "first_p95": first[int(0.95 * (len(first) - 1))],
            "gap_median": statistics.median(gaps),
            "gap_p95": gaps[int(0.95 * (len(gaps) - 1))],
            "tokens_per_second": tokens / (ended - began),
            "answers": len(first),
        }

    def _run(self, number: int) -> None:
        asked = questions(number)
        who = (("x-user-id", f"user{number}"),)
        for turn in range(10**6):
            if self._stopping.is_set():
                return
            request = chat_pb2.ChatRequest(message=asked[turn % len(asked)], sampling={"max_tokens": TOKENS})
            began = last = time.monotonic()
            for event in self._chat.Chat(request, timeout=SECONDS, metadata=who):
                now = time.monotonic()
                match event.WhichOneof("event"):
                    case "delta":
                        (self.first if last == began else self.gaps).append((now, now - last))
                        last = now
                    case "finished":
                        self.tokens.append((now, event.finished.usage.completion_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    work: Path = arguments.work_dir.resolve()
    pairs = make_pool(arguments.model, work, lambda line: print(line, file=sys.stderr))
    data = work / "beside"
    make_data(work, data, CELL, pairs)
    os.environ["PREFLOOP_COMPILE"] = "true"
    server = Server(data, arguments.model, lambda line: print(line, file=sys.stderr))
    server.start()
    with server:
        chatters = Chatters(server.address, arguments.streams)
        results = {
            name: phase(chatters, data, arguments.seconds, nice)
            for name, nice in (("alone", None), ("beside, nice 10", 10), ("beside, nice 0", 0), ("alone again", None))
        }
        chatters.stop()
    if arguments.write:
        REPORT.write_text(report(results, arguments.streams, arguments.seconds))
    print(json.dumps({"benchmark": "beside", "streams": arguments.streams, "results": results}))


def phase(chatters: Chatters, data: Path, seconds: float, nice: int | None) -> dict[str, Any]:
    """What the clients saw for so long, beside a round where `nice` is given."""
    round_ = None
    if nice is not None:
        command = [sys.executable, "-m", "learner.cli", "run-once", "--data-dir", str(data), "--json"]
        environment = {**os.environ, "PREFLOOP_NICE": str(nice)}
        round_ = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    if round_:
        try:
            round_.wait(seconds)
        except subprocess.TimeoutExpired:
            round_.send_signal(signal.SIGTERM)
    else:
        time.sleep(seconds)
    ended = time.monotonic()
    if round_:
        round_.wait(SECONDS)
    figures = chatters.seen(began, ended)
    print(figures, file=sys.stderr, flush=True)
    return figures


def report(results: dict[str, dict[str, float]], streams: int, seconds: float) -> str:
    lines = [
        "# What a round costs the people who chat meanwhile",
        "",
        "Made by [`benchmarks/beside.py`](../../benchmarks/beside.py) on a machine of two cores without a GPU:",
        f"SmolLM2-135M-Instruct, compiled, {streams} clients that chat without a pause, {seconds:.0f} s a phase. The "
        "rounds learn from two",
        "hundred votes. One reading each.",
        "",
        "| | first token, median, s | 95 % | gap between deltas, median, s | 95 % | tokens/s | answers |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        lines.append(
            f"| {name} | {row['first_median']:.3f} | {row['first_p95']:.3f} | {row['gap_median']:.3f} | "
            f"{row['gap_p95']:.3f} | {row['tokens_per_second']:.0f} | {row['answers']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
