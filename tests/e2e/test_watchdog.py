"""An engine that is stopped, spins or blocks is noticed and started again; one that is only slow is left alone."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prefloop.v1 import chat_pb2

from tests.e2e.conftest import LiveServer, children, live_server
from tests.tiers import slow

pytestmark = pytest.mark.e2e

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LONG = "Tell me a very long story about a lighthouse keeper."


def engine(server: LiveServer) -> int:
    [pid] = [pid for pid in children(server.process.pid) if "EngineCor" in Path(f"/proc/{pid}/comm").read_text()]
    return pid


def seconds_until_noticed(server: LiveServer, strike: signal.Signals | None) -> float:
    """From the blow, or from when a stream stops, to NOT_SERVING; returns once the server serves again."""
    health = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=300)
    assert next(health).status == SERVING
    struck = time.monotonic()
    call = server.chat.Chat(chat_pb2.ChatRequest(message=LONG, sampling={"max_tokens": 400}), timeout=240)

    def listen() -> None:
        nonlocal strike, struck
        for event in call:
            if event.HasField("delta"):
                if strike:
                    os.kill(engine(server), strike)
                    strike = None
                struck = time.monotonic()

    with pytest.raises(grpc.RpcError) as error:
        listen()
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert next(health).status == NOT_SERVING
    noticed = time.monotonic() - struck
    assert next(health).status == SERVING
    health.cancel()
    return noticed


def test_an_engine_that_dies_is_noticed_in_two_seconds_one_that_is_stopped_in_twelve(
    tiny_model: Path, tmp_path: Path
) -> None:
    with live_server(tmp_path / "data", tiny_model) as own:
        assert seconds_until_noticed(own, signal.SIGKILL) < 2
        assert 9 < seconds_until_noticed(own, signal.SIGSTOP) < 12
    log = "".join(own.log)
    assert "the engine's process has not run for 10 s; it was killed" in log


@pytest.mark.parametrize("how", ["spin", slow("block")])
def test_a_step_that_never_ends_is_noticed_whatever_it_does(tiny_model: Path, tmp_path: Path, how: str) -> None:
    with live_server(tmp_path / "data", tiny_model, PREFLOOP_FAILPOINT=f"step:40:{how}") as own:
        assert 29 < seconds_until_noticed(own, None) < 33
    assert "the engine has not finished a step for 30 s" in "".join(own.log)


@contextmanager
def busy() -> Iterator[None]:
    """A process that wants a core and gives nothing way."""
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


def test_a_slow_engine_is_left_alone_and_its_long_prompts_do_not_hold_up_others(default: LiveServer) -> None:
    """Sixteen prompts near the context's limit at once, beside a busy process: some twenty thousand tokens to read."""
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
                chat_pb2.ChatRequest(message=f"{number} {words} Which owl was last?", sampling={"max_tokens": 4}),
                timeout=600,
            )
            for number in range(16)
        ]
        reader = threading.Thread(target=read)
        reader.start()
        for call in calls:
            *_, last = call
            assert last.finished.usage.prompt_tokens > 1500
        reader.join()
    assert engine(default) == before
    # A step computes about a second's worth of tokens; beside a busy process it takes some times as long.
    assert max(gaps[1:]) < 10
