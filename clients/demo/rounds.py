"""One round of the learner in the demo: a process next to the server, and long answers around the swap.

The outcome of a round is read from the server. A round that ended while no demo was running therefore counts too, and
no promoted round is repeated.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from prefloop.v1.policy_pb2 import (
    ROUND_STATE_CANARY,
    ROUND_STATE_PROMOTED,
    ROUND_STATE_REJECTED,
    ROUND_STATE_RUNNING,
    Round,
)
from rich.console import Console
from rich.text import Text

from clients.client import Client
from clients.demo.plan import CANARY_ANSWERS, FLIP_RATE
from clients.demo.processes import DemoError, Process, Server
from clients.demo.progress import Task, progress
from clients.demo.record import Record
from clients.demo.streams import LongStreams
from clients.demo.time_limit import Limit, OverdueError
from clients.demo.voter import TASTES, Answer, Voter
from clients.errors import NotFoundError

POLL_SECONDS = 0.3
# The swap is near once the learner has finished one of these stages. Streams during its training would compete for
# cores.
NEAR_THE_SWAP = ("gate", "publish", "activate")
OUTCOMES = {ROUND_STATE_PROMOTED: "promoted", ROUND_STATE_REJECTED: "rejected", ROUND_STATE_CANARY: "canary"}
# One voter decides about a canary, and no more is learned after the round.
USUAL = {
    "PREFLOOP_GATE__CANARY_VOTES": "60",
    "PREFLOOP_REVIEW__PAIRS": "64",
    "PREFLOOP_REVIEW__ACTIVE_PAIRS": "0",
}
# The user of the long answers during the swap.
LISTENER = "listener"


def learn(record: Record, console: Console, server: Server, client: Client) -> None:
    """Runs the learner until one more round has ended, and records the outcome. If its version waits as a canary, the
    demo's voter is the people who decide."""
    known = {report["round_id"] for report in record.reports}
    result = record.directory / "demo-round.json"
    last = last_round(client, known)
    if last is None or last.state == ROUND_STATE_CANARY:
        with record.stage("round"), streams_around_the_swap(record, console, client) as live:
            if last is None:
                run_learner(record, console, server, client, live, result)
            decide_canary(record, console, server, client, live)
        last = last_round(client, known)
    if last is None:
        raise DemoError(f"The learner learned nothing: {sentence(result)}")
    with record.step():
        record.reports.append(report_of(last))


@contextmanager
def streams_around_the_swap(record: Record, console: Console, client: Client) -> Iterator[LongStreams]:
    """Long answers that the block starts; those that are open at its end run to theirs, and are recorded."""
    # The learner must not train on the questions of the streams; those of a killed demo may still be there.
    listener = client.acting_as(user=LISTENER)
    forget_all(listener)
    live = LongStreams(listener)
    try:
        yield live
    except BaseException:
        # The open streams end with the client.
        live.leave()
        raise
    with progress(console, "waiting for the open streams"):
        answers = live.stop()
    with record.step():
        record.streams = len(answers)
        record.crossing = [spans for answer in answers if (spans := crossing(listener, answer))]
    forget_all(listener)


def run_learner(
    record: Record, console: Console, server: Server, client: Client, live: LongStreams, result: Path
) -> None:
    """Runs `learner run-once` in a separate process, and starts the streams near the swap."""
    result.unlink(missing_ok=True)
    command = ["learner.cli", "run-once", "--data-dir", str(record.directory), "--wait", "--report", str(result)]
    if record.work.ppo_steps is not None:
        command += ["--steps", str(record.work.ppo_steps)]
    limit = record.pace.round_limit()
    with progress(console, "a round of the learner") as task:
        learner = Process(command, record.directory / "learner.log", Lines(console, task, limit).hear, USUAL)
        try:
            while not learner.ended(POLL_SECONDS):
                limit.check()
                server.check()
                if not live.running and near_the_swap(client):
                    live.start()
        finally:
            code = learner.stop()
    if code:
        raise DemoError(f"The learner failed: {sentence(result)}")


def decide_canary(record: Record, console: Console, server: Server, client: Client, live: LongStreams) -> None:
    """While the newest version waits, compares its answers with those of the served one."""
    plan = record.plan
    voter = Voter(TASTES[plan.taste], flip_rate=FLIP_RATE, max_tokens=record.work.max_tokens, seed=plan.seed)
    limit = record.pace.limit("Comparing the two versions", CANARY_ANSWERS)
    with progress(console, "comparing the new version with the served one") as task:
        while (newest := next(client.rounds(), None)) and newest.state == ROUND_STATE_CANARY:
            limit.check()
            server.check()
            if not live.running:
                live.start()
            if voter.review(client):
                task.advance()
            else:
                # The server looks at the choices every few seconds.
                time.sleep(POLL_SECONDS)


class Lines:
    """Shows the learner's output lines, and reports to `limit` those that show progress."""

    def __init__(self, console: Console, task: Task, limit: Limit) -> None:
        self._console, self._task, self._limit = console, task, limit
        self._newest = ""

    def hear(self, line: str) -> None:
        """Handles one line. A running stage repeatedly prints its progress, a comma, and the time so far."""
        done, comma, time_so_far = line.partition(",")
        if comma and " so far" in time_so_far:
            self._task.say(done)
        elif line:
            self._console.print(Text(line), soft_wrap=True)
        if done and done != self._newest:
            self._newest = done
            self._limit.progress()


def last_round(client: Client, known: set[str]) -> Round | None:
    """The newest round if it was promoted or rejected or waits for people, and is not in `known`."""
    newest = next(client.rounds(), None)
    return newest if newest and newest.state in OUTCOMES and newest.round_id not in known else None


def report_of(ended: Round) -> dict[str, Any]:
    """The part of a round that the demo records."""
    return {
        "round_id": ended.round_id,
        "state": OUTCOMES[ended.state],
        "sentence": ended.reason,
        "policy_version": ended.policy_version,
        "metrics": MessageToDict(ended.metrics),
    }


def sentence(result: Path) -> str:
    """The sentence in the learner's report."""
    try:
        return str(json.loads(result.read_text(encoding="utf-8"))["sentence"])
    except (OSError, ValueError, KeyError):
        return f"see {result.parent / 'learner.log'}."


def near_the_swap(client: Client) -> bool:
    """Whether the running round has only its last, short stages left."""
    newest = next(client.rounds(), None)
    return newest is not None and newest.state == ROUND_STATE_RUNNING and newest.stage in NEAR_THE_SWAP


def forget_all(client: Client) -> None:
    for conversation in list(client.conversations()):
        with suppress(NotFoundError):
            client.delete_conversation(conversation.conversation_id)


def crossing(client: Client, answer: Answer) -> str:
    """ "v0000 made tokens 0-41, v0001 made tokens 42-299" for an answer by two versions; empty for any other."""
    spans = client.conversation(answer.conversation_id).turns[0].response.spans
    if len({span.policy_version for span in spans}) < 2:
        return ""
    return ", ".join(f"{span.policy_version} made tokens {span.start}-{span.end - 1}" for span in spans)


def wait_until_served(client: Client, version: str, limit: Limit) -> None:
    """Returns once `version` is active and every server has loaded it."""
    while True:
        active = client.active_policy()
        if active.policy.version != version:
            raise DemoError(f"{active.policy.version} is active after the round, not {version}.")
        if active.replicas and all(replica.loaded_version == version for replica in active.replicas):
            return
        try:
            limit.check()
        except OverdueError as error:
            errors = [replica.error for replica in active.replicas if replica.error]
            raise DemoError(" ".join([str(error), *errors])) from None
        time.sleep(POLL_SECONDS)
