"""An engine whose step spins or blocks is detected and restarted; one that is only slow is left alone.

Killed and stopped engines are tested in test_swap.py."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prefloop.v1 import chat_pb2

from tests.e2e.conftest import LiveServer, engine, live_server
from tests.tiers import slow

pytestmark = pytest.mark.e2e

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LONG = "Tell me a very long story about a lighthouse keeper."


def seconds_until_noticed(server: LiveServer) -> float:
    """Seconds from the end of a stream's events to NOT_SERVING; returns once the server is serving again."""
    health = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=300)
    assert next(health).status == SERVING
    call = server.chat.Chat(chat_pb2.ChatRequest(message=LONG, sampling={"max_tokens": 400}), timeout=240)
    stopped = time.monotonic()

    def listen() -> None:
        nonlocal stopped
        for _ in call:
            stopped = time.monotonic()

    with pytest.raises(grpc.RpcError) as error:
        listen()
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert next(health).status == NOT_SERVING
    noticed = time.monotonic() - stopped
    assert next(health).status == SERVING
    health.cancel()
    return noticed


@pytest.mark.parametrize(
    ("how", "seconds", "settings"),
    [
        ("spin", 5, {"PREFLOOP_HANG_SECONDS": "5"}),
        slow("spin", 30, {}),
        slow("block", 30, {}),
    ],
)
def test_a_step_that_never_ends_is_noticed_whatever_it_does(
    tiny_model: Path, tmp_path: Path, how: str, seconds: int, settings: dict[str, str]
) -> None:
    with live_server(tmp_path / "data", tiny_model, PREFLOOP_FAILPOINT=f"step:40:{how}", **settings) as own:
        assert seconds - 1 < seconds_until_noticed(own) < seconds + 3
    assert f"the engine has not finished a step for {seconds} s" in "".join(own.log)


@contextmanager
def busy() -> Iterator[None]:
    """Runs a process that keeps a core busy."""
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("prompts", [3, slow(16)])
def test_a_slow_engine_is_left_alone_and_its_long_prompts_do_not_hold_up_others(
    default: LiveServer, prompts: int
) -> None:
    """Concurrent, seeded prompts near the context limit next to a busy process; sixteen have over 24,000 tokens."""
    before = engine(default)
    words = " ".join(f"{number} owls" for number in range(400))
    short = chat_pb2.ChatRequest(message="Count to a hundred.", sampling={"max_tokens": 200})
    gaps: list[float] = []

    def read() -> None:
        last = time.monotonic()
        for _ in default.chat.Chat(short, timeout=600):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    with busy():
        calls = [
            default.chat.Chat(
                chat_pb2.ChatRequest(
                    message=f"{number} {words} Which owl was last?", sampling={"max_tokens": 4, "seed": number}
                ),
                timeout=600,
            )
            for number in range(prompts)
        ]
        reader = threading.Thread(target=read)
        reader.start()
        for call in calls:
            *_, last = call
            assert last.finished.usage.prompt_tokens > 1500
        reader.join()
    assert engine(default) == before
    # A step computes about a second's worth of tokens; next to a busy process it takes a few times as long.
    assert max(gaps[1:]) < 10
