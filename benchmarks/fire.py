"""Kills server, engine and learner at random moments while clients chat and vote, and checks for lost data.

    python benchmarks/fire.py MODEL --work-dir DIR [--kills 20] [--seed 0] [--write]

The server runs as an operator starts it, clients chat and vote without a pause and retry every failure with the same
request_id, and a learner runs small rounds one after another. SIGKILL hits one of the three, chosen at random, some
seconds after all have recovered. We restart the server and the learner, as systemd would; the server restarts the
engine. At the end the store is compared with the responses to clients: every finished answer with its text, every
acknowledged vote, and each request once. `--write` writes docs/benchmarks/fire.md. Prints one JSON line last.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil  # type: ignore[import-untyped]
from prefloop.v1 import chat_pb2, chat_pb2_grpc, feedback_pb2, feedback_pb2_grpc

from clients.client import Client
from clients.demo.questions import questions
from clients.errors import PrefloopError
from server.store.store import Store

CLIENTS = 6
READY_SECONDS = 240
QUIET = (5.0, 20.0)
VICTIMS = ("server", "engine", "learner")
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "fire.md"
# Rounds that end within a minute or two, whatever the votes.
SMALL = {
    "PREFLOOP_MIN_VOTES": "20", "PREFLOOP_LEASE_SECONDS": "3", "PREFLOOP_PPO__STEPS": "2",
    "PREFLOOP_PPO__EPISODES": "8", "PREFLOOP_GATE__CANARY": "off", "PREFLOOP_REWARD__REFERENCE_ANSWERS": "16",
    "PREFLOOP_REVIEW__ACTIVE_PAIRS": "0",
    "PREFLOOP_GATE__SIGNAL_P": "1", "PREFLOOP_GATE__PROMPTS": "8", "PREFLOOP_GATE__REFITS": "100",
    "PREFLOOP_MAX_RESUMES": "100",
}  # fmt: skip
# Many short answers.
SERVER = {"PREFLOOP_COMPILE": "false", "PREFLOOP_MAX_TOKENS": "64", "PREFLOOP_METRICS_PORT": "0"}


@dataclass
class Told:
    """The responses that clients received, and the number of retries."""

    answers: dict[str, str] = field(default_factory=dict)
    votes: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    again: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    data = arguments.work_dir.resolve() / "fire"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    result = burn(data, arguments.model, arguments.kills, random.Random(arguments.seed))
    if arguments.write:
        REPORT.write_text(report(result))
    print(json.dumps({"benchmark": "fire", **result}))
    if result["wrong"]:
        sys.exit(1)


def burn(data: Path, model: str, kills: int, draw: random.Random) -> dict[str, Any]:
    told, stopping = Told(), threading.Event()
    server = Kept(
        data / "server.log", ["server.cli", "serve", "--port", str(free_port()), "--model", model], data, SERVER
    )
    address = f"127.0.0.1:{server.command[server.command.index('--port') + 1]}"
    server.start()
    wait_until_serving(address)
    learner = Kept(data / "learner.log", ["learner.cli", "run-once", "--json"], data, SMALL)
    crowd = [threading.Thread(target=talk, args=(address, number, told, stopping)) for number in range(CLIENTS)]
    keeper = threading.Thread(target=keep_learning, args=(learner, stopping))
    for thread in [*crowd, keeper]:
        thread.start()
    killed: Counter[str] = Counter()
    slowest = 0.0
    try:
        for number in range(kills):
            time.sleep(draw.uniform(*QUIET))
            victim = draw.choice(VICTIMS)
            struck = time.monotonic()
            if not kill(victim, server, learner):
                continue
            killed[victim] += 1
            if victim == "server":
                server.wait()
                server.start()
            if victim != "learner":
                # The health service may not have noticed a dead engine yet; a whole answer shows that it is back.
                chats = chat_pb2_grpc.ChatServiceStub(grpc.insecure_channel(address))
                while not answer(chats, "fire", "Hello.", Counter())[2]:
                    time.sleep(0.2)
                slowest = max(slowest, time.monotonic() - struck)
            say(f"{number + 1} of {kills}: {victim} killed, well again after {time.monotonic() - struck:.1f} s")
    finally:
        stopping.set()
        for thread in [*crowd, keeper]:
            thread.join(READY_SECONDS)
        learner.stop()
        rounds = finish_learning(data)
        server.stop()
    return {
        "kills": dict(killed),
        "answers": len(told.answers),
        "votes": len(told.votes),
        "asked_again": dict(told.again),
        "slowest_recovery_s": slowest,
        "rounds": rounds,
        "wrong": lost(data, told) + left_behind(server.pids | learner.pids),
    }


class Kept:
    """A prefloop command as a process that can be restarted; its output goes to `log`."""

    def __init__(self, log: Path, command: list[str], data: Path, settings: dict[str, str]) -> None:
        self.command = [sys.executable, "-m", *command, "--data-dir", str(data)]
        self.pids: set[int] = set()
        self._log = log
        self._environment = {**os.environ, **settings}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("a") as output:
            self.process = subprocess.Popen(self.command, env=self._environment, stdout=output, stderr=output)
        self.pids.add(self.process.pid)

    def wait(self) -> int:
        assert self.process
        return self.process.wait(READY_SECONDS)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.wait()


def kill(victim: str, server: Kept, learner: Kept) -> bool:
    """Sends SIGKILL; False if the process does not exist at this moment."""
    try:
        target = (server if victim != "learner" else learner).process
        assert target
        process = psutil.Process(target.pid)
        if victim == "engine":
            engines = [child for child in process.children(recursive=True) if child.name().startswith("VLLM::Eng")]
            process = engines[0]
        process.kill()
    except (psutil.NoSuchProcess, IndexError, AssertionError):
        return False
    return True


def keep_learning(learner: Kept, stopping: threading.Event) -> None:
    while not stopping.is_set():
        learner.start()
        learner.wait()
        stopping.wait(1.0)


def finish_learning(data: Path) -> dict[str, int]:
    """Finishes the last interrupted round; returns the number of rounds by state."""
    command = [sys.executable, "-m", "learner.cli", "run-once", "--data-dir", str(data)]
    with (data / "learner.log").open("a") as log:
        subprocess.run(
            command, env={**os.environ, **SMALL}, stdout=log, stderr=log, timeout=2 * READY_SECONDS, check=False
        )
    with closing(Store.open(data)) as store:
        return store.rounds.count()


# Clients that chat and vote


def talk(address: str, number: int, told: Told, stopping: threading.Event) -> None:
    """One user, who repeatedly asks a question and votes on the answer."""
    channel = grpc.insecure_channel(address, [("grpc.max_reconnect_backoff_ms", 500)])
    chats, votes = chat_pb2_grpc.ChatServiceStub(channel), feedback_pb2_grpc.FeedbackServiceStub(channel)
    user, asked = f"user{number}", questions(number)
    for turn in range(100_000):
        if stopping.is_set():
            return
        told.asked += 1
        response_id, text, whole = answer(chats, user, asked[turn % len(asked)], told.again)
        if whole:
            told.answers[response_id] = text
        if text:
            thumb = feedback_pb2.THUMB_UP if len(text) % 2 else feedback_pb2.THUMB_DOWN
            request = feedback_pb2.SubmitThumbRequest(
                response_id=response_id, thumb=thumb, request_id=str(uuid.uuid4())
            )
            reply = insist(lambda: votes.SubmitThumb(request, metadata=metadata(user), timeout=30), told.again)  # noqa: B023
            told.votes[reply.feedback.feedback_id] = feedback_pb2.Thumb.Name(thumb).removeprefix("THUMB_")


def answer(chats: Any, user: str, question: str, again: Counter[str]) -> tuple[str, str, bool]:
    """Response id, text, and whether the answer is complete. The same request is retried until there is an answer."""
    request = chat_pb2.ChatRequest(
        message=question, sampling=chat_pb2.SamplingOptions(max_tokens=64), request_id=str(uuid.uuid4())
    )

    def ask() -> list[Any]:
        return list(chats.Chat(request, metadata=metadata(user), timeout=120))

    started, *_, last = insist(ask, again)
    whole = last.finished.finish_reason in (chat_pb2.FINISH_REASON_STOP, chat_pb2.FINISH_REASON_LENGTH)
    return started.started.response_id, last.finished.text, whole


def insist(call: Callable[[], Any], again: Counter[str]) -> Any:
    """Retries until the call succeeds; errors that are not retryable are raised."""
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            code = error.code()
            again[code.name] += 1
            if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
                raise
            time.sleep(0.2)


def metadata(user: str) -> tuple[tuple[str, str], ...]:
    return (("x-user-id", user),)


# Lost data


def lost(data: Path, told: Told) -> list[str]:
    """Sentences on differences between the store and the responses to clients."""
    with closing(Store.open(data)) as store:
        rows = store._db.rows("SELECT id, text, status FROM responses")
        kept = {row["id"]: row["text"] for row in rows}
        wrong = [f"answer {key} is not as it was told" for key, text in told.answers.items() if kept.get(key) != text]
        wrong += [f"{row['id']} is still being sampled" for row in rows if row["status"] == "streaming"]
        votes = {row["id"]: row["value"] for row in store._db.rows("SELECT id, value FROM feedback")}
        wrong += [f"vote {key} is not as it was told" for key, value in told.votes.items() if votes.get(key) != value]
        twice = store._db.rows("SELECT feedback_id FROM feedback_events GROUP BY feedback_id HAVING count(*) > 1")
        wrong += [f"vote {row['feedback_id']} is there twice" for row in twice]
        [turns] = store._db.rows("SELECT count(*) AS n FROM turns JOIN conversations c ON c.id = conversation_id WHERE c.user != 'fire'")  # fmt: skip  # noqa: E501
        if turns["n"] != told.asked:
            wrong.append(f"{told.asked} questions were asked, {turns['n']} are in the store")
        [check] = store._db.rows("PRAGMA integrity_check")
        if check["integrity_check"] != "ok":
            wrong.append(f"the database is damaged: {check['integrity_check']}")
        for policy in store.policies.page(1000):
            if policy.prune_time is None and not (data / "policies" / policy.version / "manifest.json").exists():
                wrong.append(f"{policy.version} is registered and not there")
    return wrong


def left_behind(pids: set[int]) -> list[str]:
    """Engines that outlived their parent process by more than a few seconds."""
    time.sleep(5)
    engines = [one for one in psutil.process_iter(["name", "ppid"]) if (one.info["name"] or "").startswith("VLLM::Eng")]
    return [f"engine {one.pid} was left behind" for one in engines if one.info["ppid"] in pids | {1}]


def wait_until_serving(address: str) -> None:
    end = time.monotonic() + READY_SECONDS
    while True:
        try:
            with Client(address) as client:
                client.check()
            return
        except PrefloopError:
            if time.monotonic() > end:
                sys.exit("the server does not come up; read server.log")
            time.sleep(0.5)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def report(result: dict[str, Any]) -> str:
    kills = ", ".join(f"{name} {count}" for name, count in result["kills"].items())
    again = ", ".join(f"{name} {count}" for name, count in result["asked_again"].items())
    rounds = ", ".join(f"{count} {state}" for state, count in result["rounds"].items())
    return f"""# Random kills under load

Made by [`benchmarks/fire.py`](../../benchmarks/fire.py) on a machine of two cores without a GPU: SmolLM2-135M-Instruct,
{CLIENTS} clients that chat and vote without pauses and retry every failure with the same request_id, a learner that
runs small rounds throughout, and SIGKILL at random moments.

| | |
| --- | --- |
| killed | {kills} |
| answers that clients heard to the end | {result["answers"]} |
| votes acknowledged | {result["votes"]} |
| calls that failed and were made again | {again} |
| from a kill to the next answer, slowest | {result["slowest_recovery_s"]:.1f} s |
| rounds | {rounds} |
| answers or votes lost, changed or there twice; engines left behind | {len(result["wrong"])} |
"""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
