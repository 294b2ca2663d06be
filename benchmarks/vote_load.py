"""Clients that vote as fast as they are acknowledged, and an empty gRPC handler to compare with; each a process."""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import grpc
import uvloop
from prefloop.v1 import feedback_pb2, feedback_pb2_grpc

from server.settings import ServerSettings
from server.store.chats.records import Generation, Span
from server.store.store import Store

# Answers of each voter: enough for several runs of a few seconds, each about answers that have no vote.
ANSWERS = 1_200
ECHO = "/echo/Echo"
LIMIT_SECONDS = 300
# A key, and the answers of its user.
Voter = tuple[str, list[str]]


def make_voters(store: Store, count: int, prefix: str = "") -> list[Voter]:
    """Users with a key and answers of their own; returns each one's key and the answers' ids."""
    voters: list[Voter] = []
    for number in range(count):
        user = f"{prefix}voter{number}"
        store.conversations.create(user, "Hi")
        voters.append((store.keys.create(user, "user"), []))
    conversations = [store.conversations.page(f"{prefix}voter{number}", 1)[0].id for number in range(count)]
    # As in life: answers of many users, one after another.
    for _ in range(ANSWERS):
        with store.transaction():
            for number, conversation_id in enumerate(conversations):
                response_id = store.responses.begin(
                    f"{prefix}voter{number}", conversation_id, message="Hi", replica_id="benchmark",
                    policy_version="v0000", prompt_token_ids=[1, 2], temperature=0.85, max_tokens=1, seed=None,
                )  # fmt: skip
                store.responses.finish(response_id, Generation([3], [-0.5], "Hi", "length", [Span(0, 1, "v0000")]))
                voters[number][1].append(response_id)
    return voters


def run_load(address: str, voters: list[Voter], seconds: float, *, echo: bool = False) -> dict[str, float]:
    """Let all vote for some seconds; returns `calls`, `seconds`, `p50_ms`, `p99_ms` and the clients' `cpu_s`."""
    clients = start_load(address, voters, seconds, echo=echo)
    out, _ = clients.communicate(timeout=LIMIT_SECONDS)
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    return figures


def start_load(
    address: str, voters: list[Voter], seconds: float, *, echo: bool = False, rate: float = 0.0
) -> "subprocess.Popen[str]":
    """The clients' process, which prints `ready` once all are connected. They call as fast as they can, or at `rate`
    calls per second in total."""
    what = json.dumps({"address": address, "voters": voters, "seconds": seconds, "echo": echo, "rate": rate})
    clients = subprocess.Popen(
        [sys.executable, __file__, "--load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert clients.stdin
    clients.stdin.write(what + "\n")
    clients.stdin.flush()
    return clients


@contextmanager
def echo_servers(processes: int) -> Iterator[tuple[str, list[int]]]:
    """Empty handlers that share a port; yields the address and the processes' ids."""
    running: list[subprocess.Popen[str]] = []
    port = "0"
    try:
        for _ in range(processes):
            running.append(
                subprocess.Popen([sys.executable, __file__, "--echo", port], stdout=subprocess.PIPE, text=True)
            )
            out = running[-1].stdout
            assert out
            port = out.readline().strip()
        yield f"127.0.0.1:{port}", [one.pid for one in running]
    finally:
        for one in running:
            one.terminate()
            one.wait(LIMIT_SECONDS)


async def load(address: str, voters: list[Voter], seconds: float, echo: bool, rate: float) -> None:
    """Each user calls again as soon as the last call is acknowledged, over a connection of their own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in voters]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    calls = [voter(channel, *one, echo) for channel, one in zip(channels, voters, strict=True)]
    print("ready", flush=True)
    took: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()

    async def again(call: Callable[[int], Awaitable[Any]]) -> None:
        number = 0
        while (now := time.perf_counter()) < started + seconds:
            await call(number)
            number += 1
            took.append(time.perf_counter() - now)
            if rate:
                await asyncio.sleep(len(voters) / rate)

    await asyncio.gather(*map(again, calls))
    elapsed = time.perf_counter() - started
    took.sort()
    figures = {
        "calls": len(took), "seconds": elapsed, "cpu_s": time.process_time() - cpu,
        "p50_ms": 1000 * took[len(took) // 2], "p99_ms": 1000 * took[int(len(took) * 0.99)],
    }  # fmt: skip
    print(json.dumps(figures))
    await asyncio.gather(*(channel.close() for channel in channels))


def voter(channel: grpc.aio.Channel, key: str, answers: list[str], echo: bool) -> Callable[[int], Awaitable[Any]]:
    """A function that casts one vote, or calls the empty handler with the same message."""
    metadata = (("authorization", f"Bearer {key}"),)
    ids = itertools.cycle(answers)

    def vote(number: int) -> Any:
        thumb = feedback_pb2.THUMB_UP if number // len(answers) % 2 else feedback_pb2.THUMB_DOWN
        return feedback_pb2.SubmitThumbRequest(response_id=next(ids), thumb=thumb, request_id=str(uuid.uuid4()))

    if echo:
        method: Any = channel.unary_unary(ECHO)
        return lambda number: method(vote(number).SerializeToString(), metadata=metadata)
    feedback: Any = feedback_pb2_grpc.FeedbackServiceStub(channel)
    return lambda number: feedback.SubmitThumb(vote(number), metadata=metadata)


class Echo(grpc.GenericRpcHandler):
    """Returns what it gets."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def echo(request: bytes, context: Any) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(echo)


async def serve_echo(port: int) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    server.add_generic_rpc_handlers((Echo(),))
    print(server.add_insecure_port(f"127.0.0.1:{port}"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--echo", type=int, metavar="PORT")
    parser.add_argument("--load", action="store_true", help="what to do is on standard input, as JSON")
    parser.add_argument("--voters", type=int, metavar="COUNT", help="make voters in the store, and print them as JSON")
    arguments = parser.parse_args()
    if arguments.voters:
        with closing(Store.open(ServerSettings.load().data_dir)) as opened:
            print(json.dumps(make_voters(opened, arguments.voters)))
        sys.exit()
    uvloop.run(load(**json.loads(sys.stdin.readline())) if arguments.load else serve_echo(arguments.echo))
