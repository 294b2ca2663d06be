"""The cost of a busy process and of a learner round for users who chat, and the cost of chats for the round.

    python benchmarks/beside.py --work-dir DIR [--model MODEL] [--seconds 20] [--steps 2] [--write]

Starts a server, casts a hundred votes, and chats without a pause with 1, 4 and 16 streams, each alone and next to one
process that spins at the server's priority. Then runs `learner run-once` on a copy of the data, alone and next to 4
streams, with few PPO steps, since only the ratio matters. `--write` replaces the tables of the same dtype in
docs/benchmarks/beside.md. Prints one JSON line last.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from prefloop.v1 import chat_pb2, chat_pb2_grpc

from clients import Client
from clients.demo.questions import questions
from clients.demo.voter import TASTES, Voter
from server.shared.model.dtype import resolve_dtype

STREAMS = (1, 4, 16)
BESIDE_ROUND = 4
TOKENS, VOTES = 64, 100
START_SECONDS, CALL_SECONDS, ROUND_SECONDS = 300, 300, 1800
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "beside.md"


class Chatters:
    """Clients that chat one answer after another and record their timings."""

    def __init__(self, address: str, count: int) -> None:
        self._first: list[tuple[float, float]] = []  # when asked, seconds to the first text
        self._texts: list[float] = []  # when each text arrived: nearly all are one token
        self._stopping = threading.Event()
        self._chat = chat_pb2_grpc.ChatServiceStub(grpc.insecure_channel(address))
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(CALL_SECONDS)

    def seen(self, began: float, ended: float) -> dict[str, float]:
        """Results for the time between `began` and `ended`."""
        first = [seconds for at, seconds in self._first if began <= at < ended]
        texts = sum(began <= at < ended for at in self._texts)
        return {
            "first_seconds": round(statistics.median(first), 3) if first else float("nan"),
            "texts_per_second": round(texts / (ended - began), 1),
        }

    def _run(self, number: int) -> None:
        asked = questions(number)
        who = (("x-user-id", f"user{number}"),)
        for turn in range(10**6):
            if self._stopping.is_set():
                return
            request = chat_pb2.ChatRequest(
                message=asked[turn % len(asked)], sampling=chat_pb2.SamplingOptions(max_tokens=TOKENS)
            )
            began, heard = time.monotonic(), False
            for event in self._chat.Chat(request, timeout=CALL_SECONDS, metadata=who):
                if event.HasField("delta"):
                    now = time.monotonic()
                    if not heard:
                        self._first.append((began, now - began))
                    heard = True
                    self._texts.append(now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    work: Path = arguments.work_dir.resolve()
    found: dict[str, Any] = {"benchmark": "beside", "dtype": resolve_dtype("auto").name, "phases": {}}
    with serving(work / "data", arguments.model) as address:
        with Client(address, user="voter") as client:
            voter = Voter(TASTES["short"], flip_rate=0.1, max_tokens=TOKENS, seed=0)
            voter.vote_on(client, questions(0)[:VOTES], concurrency=16, on_vote=lambda: None)
        for streams in STREAMS:
            found["phases"][str(streams)] = {
                "alone": chat(address, streams, arguments.seconds),
                "spinner": beside_spinner(address, streams, arguments.seconds),
            }
        found["round_alone"] = round_seconds(work, arguments.steps)
        chatters = Chatters(address, BESIDE_ROUND)
        began = time.monotonic()
        found["round_beside"] = round_seconds(work, arguments.steps)
        found["phases"][str(BESIDE_ROUND)]["round"] = chatters.seen(began, time.monotonic())
        chatters.stop()
    if arguments.write:
        REPORT.write_text(with_section(REPORT.read_text(), found["dtype"], section(found, arguments.seconds)))
    print(json.dumps(found))


@contextmanager
def serving(data: Path, model: str) -> Iterator[str]:
    """Runs `server serve`, eager, on a free port; yields its address."""
    command = [sys.executable, "-m", "server.cli", "serve", "--data-dir", str(data), "--port", "0", "--model", model]
    environment = {**os.environ, "PREFLOOP_COMPILE": "false", "PREFLOOP_METRICS_PORT": "0"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    impatience = threading.Timer(START_SECONDS, server.kill)
    impatience.start()
    try:
        assert server.stdout
        ready = next((line for line in server.stdout if line.startswith("serving ")), None)
        impatience.cancel()
        if ready is None:
            sys.exit("the server did not start")
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield ready.split()[-1]
    finally:
        server.terminate()
        server.wait()


def chat(address: str, streams: int, seconds: float) -> dict[str, float]:
    """Results of `streams` clients over `seconds`, after all of them have started."""
    chatters = Chatters(address, streams)
    time.sleep(seconds / 4)
    began = time.monotonic()
    time.sleep(seconds)
    figures = chatters.seen(began, time.monotonic())
    chatters.stop()
    print(streams, figures, file=sys.stderr, flush=True)
    return figures


def beside_spinner(address: str, streams: int, seconds: float) -> dict[str, float]:
    spinner = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        return chat(address, streams, seconds)
    finally:
        spinner.kill()
        spinner.wait()


def round_seconds(work: Path, steps: int) -> float:
    """Times a round on a copy of the data, so that a second round has as much to learn."""
    data = work / "round"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    copy = [sys.executable, "-m", "server.cli", "backup", str(data / "data"), "--data-dir", str(work / "data")]
    subprocess.run(copy, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "learner.cli", "run-once", "--data-dir", str(data / "data"), "--steps", str(steps)]
    # Accept any signal, so that the whole round is timed.
    environment = {**os.environ, "PREFLOOP_GATE__SIGNAL_P": "1", "PREFLOOP_GATE__CANARY": "off"}
    environment["PREFLOOP_REVIEW__ACTIVE_PAIRS"] = "0"
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True, timeout=ROUND_SECONDS, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - began, 1)


def section(found: dict[str, Any], seconds: float) -> str:
    """The results of one dtype, as Markdown under a heading."""
    lines = [
        f"## {found['dtype']}",
        "",
        f"{seconds:.0f} s per phase, one reading each.",
        "",
        "| streams | | tokens/s | of alone | first token, median, s |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for streams, phases in found["phases"].items():
        for name, row in phases.items():
            share = row["texts_per_second"] / phases["alone"]["texts_per_second"]
            lines.append(
                f"| {streams} | {name} | {row['texts_per_second']:.0f} | {share:.2f} | {row['first_seconds']:.3f} |"
            )
    ratio = found["round_beside"] / found["round_alone"]
    lines += [
        "",
        f"The round took {found['round_alone']:.0f} s alone and {found['round_beside']:.0f} s with {BESIDE_ROUND} "
        f"streams: {ratio:.2f} times as long.",
    ]
    return "\n".join(lines) + "\n"


def with_section(page: str, dtype: str, written: str) -> str:
    """The page with the dtype's section replaced by `written`, or with `written` added."""
    head, *sections = re.split(r"(?m)^(?=## )", page)
    kept = [part for part in sections if not part.startswith(f"## {dtype}\n")]
    return "\n".join(part.rstrip() + "\n" for part in [head, *sorted([*kept, written])])


if __name__ == "__main__":
    main()
