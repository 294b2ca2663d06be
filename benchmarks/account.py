"""The cost of one account at its limits, or of strangers without a key, for others: memory, and the latency of votes.

    python benchmarks/account.py --work-dir DIR [--seconds 10] [--write]

Fills a data directory with one long conversation, starts a server on it, and lets four users vote as often as allowed.
At the same time a separate process runs each of these phases: nobody; eight readers of the long conversation; messages
rejected for their length; the longest demonstrations; calls that wait for each other's turn; strangers who ask for
health. All on loopback. `--write` puts the table into docs/benchmarks/account.md. Prints one JSON line last.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import psutil  # type: ignore[import-untyped]
from beside import serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2, feedback_pb2_grpc

from server.store.chats.records import Generation, Span
from server.store.store import Store

TURNS, MESSAGE_CHARS, ANSWER_CHARS = 900, 16_000, 2_000
VOTERS = 4
# Answers that each voter votes on in turn, since a thumb can be changed only a thousand times.
ANSWERS = 8
# The action of each phase, and how many perform it at once.
PHASES = {
    "nobody": ("read", 0),
    "readers of a long conversation": ("read", 8),
    "messages that are too long": ("too_long", 8),
    "the longest demonstrations": ("demonstrate", 8),
    "calls that wait for a turn": ("wait", 30),
    "strangers": ("ask_health", 200),
}
SPAWN = multiprocessing.get_context("spawn")
CALL_SECONDS = 60.0
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "account.md"


def who(name: str) -> Any:
    return (("x-user-id", name),)


def fill(data: Path) -> tuple[str, list[list[str]]]:
    """Creates one user's long conversation, and answers for each voter."""
    with closing(Store.open(data)) as store:
        conversation = store.conversations.create("busy", "hello")
        with store.group():
            for number in range(TURNS):
                answer(store, "busy", conversation, f"{number} " + "m" * MESSAGE_CHARS)
        return conversation, [
            [answer(store, voter, store.conversations.create(voter, "hello"), "hello") for _ in range(ANSWERS)]
            for voter in (f"voter{number}" for number in range(VOTERS))
        ]


def answer(store: Store, user: str, conversation: str, message: str) -> str:
    response = store.responses.begin(
        user, conversation, message=message[:MESSAGE_CHARS], replica_id="here", policy_version="v0000",
        prompt_token_ids=[1] * 1536, temperature=0.85, max_tokens=512, seed=None,
    )  # fmt: skip
    store.responses.finish(
        response, Generation([1] * 512, [-0.5] * 512, "a" * ANSWER_CHARS, "stop", [Span(0, 512, "v0000")])
    )
    return response


class Load:
    """The actions of the phases, each performed once per call."""

    def __init__(self, channel: grpc.aio.Channel, conversation: str) -> None:
        self._chat, self._feedback = (
            chat_pb2_grpc.ChatServiceStub(channel),
            feedback_pb2_grpc.FeedbackServiceStub(channel),
        )
        self._health: Any = health_pb2_grpc.HealthStub(channel)
        self._conversation = conversation

    async def read(self) -> None:
        token = ""
        while True:
            request = chat_pb2.GetConversationRequest(conversation_id=self._conversation)
            if token:
                request.page_token = token
            page = await self._chat.GetConversation(request, metadata=who("busy"), timeout=CALL_SECONDS)
            token = getattr(page, "next_page_token", "")
            if not token:
                return

    async def too_long(self) -> None:
        request = chat_pb2.ChatRequest(message="word " * (MESSAGE_CHARS // 5))
        async for _ in self._chat.Chat(request, metadata=who("busy"), timeout=CALL_SECONDS):
            pass

    async def demonstrate(self) -> None:
        parts = [
            feedback_pb2.Message(role=role, content="d" * MESSAGE_CHARS)
            for role in (feedback_pb2.ROLE_USER, feedback_pb2.ROLE_ASSISTANT) * 2
        ]
        request = feedback_pb2.SubmitDemonstrationRequest(messages=parts)
        await self._feedback.SubmitDemonstration(request, metadata=who("busy"), timeout=CALL_SECONDS)

    async def wait(self) -> None:
        request = chat_pb2.ChatRequest(
            conversation_id=self._conversation, message="Go on.", sampling=chat_pb2.SamplingOptions(max_tokens=8)
        )
        async for _ in self._chat.Chat(request, metadata=who("busy"), timeout=CALL_SECONDS):
            pass

    async def ask_health(self) -> None:
        await self._health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)


def measure(address: str, conversation: str, responses: list[list[str]], seconds: float) -> dict[str, dict[str, float]]:
    [server] = psutil.Process().children()
    found = {}
    for name in PHASES:
        receiver, sender = SPAWN.Pipe(duplex=False)
        load = SPAWN.Process(target=load_process, args=(address, conversation, name, seconds, sender))
        load.start()
        receiver.recv()
        votes = asyncio.run(vote_beside(server, address, responses, seconds))
        done, refused = receiver.recv()
        load.join()
        found[name] = {**votes, "done": done, "refused": refused}
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def load_process(address: str, conversation: str, name: str, seconds: float, sender: Any) -> None:
    """Reports when it starts, and at the end the numbers of accepted and rejected calls."""
    sender.send("ready")
    sender.send(asyncio.run(work_beside(address, conversation, name, seconds)))


async def work_beside(address: str, conversation: str, name: str, seconds: float) -> tuple[int, int]:
    ended = time.monotonic() + seconds
    done = refused = 0
    options: Any = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        work, count = getattr(Load(channel, conversation), PHASES[name][0]), PHASES[name][1]

        async def again() -> None:
            nonlocal done, refused
            while time.monotonic() < ended:
                try:
                    await work()
                    done += 1
                except grpc.aio.AioRpcError:
                    refused += 1
                    await asyncio.sleep(0.01)

        await asyncio.gather(*(again() for _ in range(count)))
    return done, refused


async def vote_beside(
    server: psutil.Process, address: str, responses: list[list[str]], seconds: float
) -> dict[str, float]:
    """The latency of votes, and the growth of the server's process."""
    before, most, ended = server.memory_info().rss, 0, time.monotonic() + seconds
    waits: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = feedback_pb2_grpc.FeedbackServiceStub(channel)

        async def vote(number: int) -> None:
            for turn in itertools.count():
                if time.monotonic() > ended:
                    return
                started = time.monotonic()
                thumb = feedback_pb2.THUMB_UP if turn // ANSWERS % 2 else feedback_pb2.THUMB_DOWN
                request = feedback_pb2.SubmitThumbRequest(response_id=responses[number][turn % ANSWERS], thumb=thumb)
                await stub.SubmitThumb(request, metadata=who(f"voter{number}"), timeout=CALL_SECONDS)
                waits.append(time.monotonic() - started)
                # As often as a user may: 1,200 calls per minute.
                await asyncio.sleep(max(0.0, 0.06 - waits[-1]))

        async def watch() -> None:
            nonlocal most
            while time.monotonic() < ended:
                most = max(most, server.memory_info().rss)
                await asyncio.sleep(0.02)

        await asyncio.gather(watch(), *(vote(number) for number in range(VOTERS)))
    waits.sort()
    return {
        "votes": len(waits),
        "vote_median_ms": round(1000 * statistics.median(waits), 1),
        "vote_p99_ms": round(1000 * waits[int(0.99 * len(waits))], 1),
        "more_mib": round((most - before) / 2**20),
    }


def report(found: dict[str, dict[str, float]], seconds: float) -> str:
    lines = [
        "# What one account at its limits costs other users",
        "",
        "Made by [`benchmarks/account.py`](../../benchmarks/account.py) on two cores: four users vote as often as they",
        f"may for {seconds:.0f} s, alongside each of these loads, all on loopback, one reading each. The long",
        f"conversation has {TURNS} messages of {MESSAGE_CHARS} characters. Memory is the server's, without its engine.",
        "",
        "| beside | a vote, median, ms | 99 % | more memory, MiB | calls done | refused |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {row['vote_median_ms']:.0f} | {row['vote_p99_ms']:.0f} | {row['more_mib']} | {row['done']} | "
        f"{row['refused']} |"
        for name, row in found.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    data = arguments.work_dir.resolve() / "data"
    conversation, responses = fill(data)
    with serving(data, arguments.model) as address:
        found = measure(address, conversation, responses, arguments.seconds)
    if arguments.write:
        REPORT.write_text(report(found, arguments.seconds), encoding="utf-8")
    print(json.dumps({"benchmark": "account", "phases": found}))


if __name__ == "__main__":
    main()
