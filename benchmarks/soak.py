"""Half an hour of mixed load, to see whether the server's resource use grows.

    python benchmarks/soak.py MODEL --work-dir DIR [--minutes 30] [--write]

The server runs as an operator starts it, under everything at once: clients that chat, compare, vote, correct, leave in
the middle of an answer, reconnect, read their history and delete it; a swap every half minute; scrapes of metrics;
invalid calls. Every ten seconds the resident memory, threads and open files of the server and its engine are sampled.
The first five minutes fill caches; after that the slope of each line is fitted. `--write` writes
docs/benchmarks/soak.md and its picture. Prints one JSON line last.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from prefloop.v1.chat_pb2 import ChatStarted, CompareStarted
from prefloop.v1.feedback_pb2 import CHOICE_A, CHOICE_BOTH_BAD, CHOICE_TIE, THUMB_DOWN, THUMB_UP

from clients.client import Client
from clients.demo.processes import Server
from clients.demo.questions import questions
from clients.errors import PrefloopError
from tests.versions import make_version, scaled

SAMPLE_SECONDS, SWAP_SECONDS = 10.0, 30.0
WARM_MINUTES = 5
PEOPLE = 4
METRICS_PORT = 19464
HERE = Path(__file__).parent
REPORT = HERE.parent / "docs" / "benchmarks" / "soak.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    data = arguments.work_dir.resolve() / "soak"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    samples, done = soak(data, arguments.model, arguments.minutes)
    lines = {name: line(samples, name) for name in samples[0] if name != "minutes"}
    if arguments.write:
        draw(samples, REPORT.with_suffix(".png"))
        REPORT.write_text(report(lines, done, samples[-1]["minutes"]))
    print(json.dumps({"benchmark": "soak", "done": done, "lines": lines}))


def soak(data: Path, model: str, minutes: float) -> tuple[list[dict[str, float]], dict[str, int]]:
    os.environ |= {"PREFLOOP_METRICS_PORT": str(METRICS_PORT), "PREFLOOP_USER_RATE": "100000"}
    done: Counter[str] = Counter()
    stopping = threading.Event()
    server = Server(data, model, say)
    server.start()
    with server:
        versions = itertools.cycle([make_version(data, scaled(factor)) for factor in (0.99, 0.98)])
        jobs: list[Callable[[], None]] = [lambda number=n: live(server.address, number, done, stopping) for n in range(PEOPLE)]  # type: ignore[misc]  # fmt: skip  # noqa: E501
        jobs += [lambda: swap(server.address, versions, done, stopping), lambda: scrape(done, stopping)]
        threads = [threading.Thread(target=job) for job in jobs]
        for thread in threads:
            thread.start()
        samples, started = [], time.monotonic()
        while (elapsed := time.monotonic() - started) < minutes * 60:
            samples.append({"minutes": elapsed / 60, **sample()})
            say(json.dumps({**samples[-1], **done}))
            time.sleep(SAMPLE_SECONDS)
        stopping.set()
        for thread in threads:
            thread.join(120)
    return samples, dict(done)


def sample() -> dict[str, float]:
    """Samples the server's front end, which is our only child, and the engine's process below it."""
    [front] = psutil.Process().children()
    [engine] = [child for child in front.children(recursive=True) if child.name().startswith("VLLM::Eng")]
    figures: dict[str, float] = {}
    for name, process in (("front end", front), ("engine", engine)):
        with process.oneshot():
            figures |= {
                f"{name}: MiB": process.memory_info().rss / 2**20,
                f"{name}: threads": process.num_threads(),
                f"{name}: files": process.num_fds(),
            }
    return figures


def live(address: str, number: int, done: Counter[str], stopping: threading.Event) -> None:
    """One user, who performs random actions and sometimes reconnects."""
    draw, asked = random.Random(number), questions(number)
    while not stopping.is_set():
        with Client(address, user=f"user{number}") as client:
            for _ in range(20):
                what = draw.choice([chat, chat, compare, leave, history, mistake])
                try:
                    what(client, draw.choice(asked), draw)
                    done[what.__name__] += 1
                except PrefloopError as error:
                    done[f"failed: {error}"] += 1
                if stopping.is_set():
                    return


def chat(client: Client, question: str, draw: random.Random) -> None:
    started, *_ = client.chat(question, max_tokens=32)
    assert isinstance(started, ChatStarted)
    vote = client.thumb(started.response_id, draw.choice([THUMB_UP, THUMB_DOWN]), comment="as it is")
    if draw.random() < 0.2:
        client.correct(started.response_id, "What it should have said.")
    if draw.random() < 0.1:
        client.retract(vote.feedback_id)
    for _ in range(draw.randint(0, 2)):
        list(client.chat("And then?", conversation_id=started.conversation_id, max_tokens=16))


def compare(client: Client, question: str, draw: random.Random) -> None:
    started, *_ = client.compare(question, max_tokens=32)
    assert isinstance(started, CompareStarted)
    client.choose(started.comparison_id, draw.choice([CHOICE_A, CHOICE_TIE, CHOICE_BOTH_BAD]))


def leave(client: Client, question: str, draw: random.Random) -> None:
    with client.chat(question, max_tokens=200) as stream:
        next(stream)
        next(stream, None)


def history(client: Client, question: str, draw: random.Random) -> None:
    for conversation in itertools.islice(client.conversations(), 5):
        client.conversation(conversation.conversation_id)
        if draw.random() < 0.5:
            client.delete_conversation(conversation.conversation_id)
    list(itertools.islice(client.feedback(), 60))


def mistake(client: Client, question: str, draw: random.Random) -> None:
    for wrong in (lambda: list(client.chat("")), lambda: client.conversation("none"), lambda: client.thumb("x", 0)):  # type: ignore[arg-type]
        try:
            wrong()
        except PrefloopError:
            continue
        raise AssertionError("a mistake went through")


def swap(address: str, versions: Any, done: Counter[str], stopping: threading.Event) -> None:
    with Client(address, timeout=120) as client:
        while not stopping.wait(SWAP_SECONDS):
            client.activate(next(versions))
            done["swap"] += 1


def scrape(done: Counter[str], stopping: threading.Event) -> None:
    while not stopping.wait(5.0):
        urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=10).read()
        done["scrape"] += 1


# Results


def line(samples: list[dict[str, float]], name: str) -> dict[str, float]:
    """The medians of the first, middle and last third after the warm-up, and the slope per hour."""
    warm = [one for one in samples if one["minutes"] >= WARM_MINUTES] or samples
    values, third = [one[name] for one in warm], max(len(warm) // 3, 1)
    slope, _ = (
        statistics.linear_regression([one["minutes"] / 60 for one in warm], values) if len(warm) > 1 else (0.0, 0)
    )
    return {
        "first": statistics.median(values[:third]),
        "middle": statistics.median(values[third : 2 * third] or values),
        "last": statistics.median(values[-third:]),
        "per_hour": slope,
    }


def draw(samples: list[dict[str, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    units = ("MiB", "threads", "files")
    figure, rows = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for axes, unit in zip(rows, units, strict=True):
        for name, colour in (("front end", "#1f4e79"), ("engine", "#c55a11")):
            axes.plot(
                [one["minutes"] for one in samples],
                [one[f"{name}: {unit}"] for one in samples],
                color=colour,
                label=name,
            )
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    rows[0].legend()
    rows[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=110)


def report(lines: dict[str, dict[str, float]], done: dict[str, int], minutes: float) -> str:
    failed = {name: count for name, count in done.items() if name.startswith("failed")}
    went = ", ".join(f"{count} {name}" for name, count in sorted(done.items()) if name not in failed)
    rows = "\n".join(
        f"| {name} | {one['first']:.0f} | {one['middle']:.0f} | {one['last']:.0f} | {one['per_hour']:+.1f} |"
        for name, one in lines.items()
    )
    return f"""# Half an hour of mixed load

Made by [`benchmarks/soak.py`](../../benchmarks/soak.py) on a machine of two cores without a GPU: SmolLM2-135M-Instruct,
{PEOPLE} simulated users who use the whole API, a swap every {SWAP_SECONDS:.0f} s, {minutes:.0f} minutes. Done: {went}.
Failed: {sum(failed.values())}.

Medians of the three thirds after the first {WARM_MINUTES} minutes, and the slope of a line through all samples:

| | first | middle | last | per hour |
| --- | --- | --- | --- | --- |
{rows}

![Memory, threads and files over time](soak.png)
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
