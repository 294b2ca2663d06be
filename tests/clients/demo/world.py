"""A fake server and learner for the demo under test: real processes that share a directory and use gRPC.

If FAKE_PAUSE names a call and its number ("Chat 20"), the process that reaches it connects to the socket FAKE_SOCKET
and waits there for ever. All conversations and votes are in files, so they survive a restart.
"""

import itertools
import json
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.struct_pb2 import Struct
from prefloop.v1 import chat_pb2, feedback_pb2, policy_pb2, review_pb2
from prefloop.v1.chat_pb2 import FINISH_REASON_STOP, SLOT_A, SLOT_B, Usage

from tests.clients.conftest import FakeService, serving

STORY = "very long story"
# A canary is promoted after so many choices.
CANARY_CHOICES = 3
METRICS = {"gate": {"chosen": {"kl": 5.5}}, "seconds": {"improve": 120.0}}
DOCTOR = {
    "state": "warning",
    "slow_reason": "This machine has one core: everything takes longer.",
    "tokens_per_second": {"one": 12.0, "sixteen": 100.0, "prefill": 300.0},
    "findings": [
        {"name": "python", "state": "ok", "value": "3.11.7", "advice": ""},
        {"name": "port", "state": "wrong", "value": "taken", "advice": "Choose another port."},
        {"name": "memory", "state": "warning", "value": "4 GiB", "advice": "A round needs 6 GiB."},
        {"name": "disk", "state": "warning", "value": "slow", "advice": "The disk is slow."},
    ],
}


class File:
    """A JSON value on disk."""

    def __init__(self, path: Path, empty: Any) -> None:
        self.path, self.empty = path, empty

    def read(self) -> Any:
        return json.loads(self.path.read_text()) if self.path.exists() else self.empty

    def write(self, value: Any) -> None:
        new = self.path.with_suffix(".part")
        new.write_text(json.dumps(value))
        new.replace(self.path)


class World:
    """The files on disk. `calls` counts the calls of each server process; `learner` has a line for each action."""

    def __init__(self, data_dir: Path) -> None:
        self.conversations = File(data_dir / "fake-conversations.json", {})
        self.votes = File(data_dir / "fake-votes.json", [])
        self.rounds = File(data_dir / "fake-rounds.json", [])
        self.calls = File(data_dir / "fake-calls.json", [])
        self.learner = File(data_dir / "fake-learner.json", [])


class Pauses:
    """Counts events in this process, and pauses it at the one that FAKE_PAUSE names."""

    def __init__(self) -> None:
        name, _, number = os.environ.get("FAKE_PAUSE", "").partition(" ")
        self._where = name, int(number or 1)
        self._happened: Counter[str] = Counter()
        self._lock = threading.Lock()

    def pass_by(self, name: str) -> None:
        with self._lock:
            self._happened[name] += 1
            if (name, self._happened[name]) == self._where:
                # Holding the lock stops all other threads too.
                with socket.socket(socket.AF_UNIX) as waiting:
                    waiting.connect(os.environ["FAKE_SOCKET"])
                    waiting.recv(1)


class Service(FakeService):
    """Answers as the last promoted version would: short answers once there is one."""

    def __init__(self, world: World, pauses: Pauses) -> None:
        super().__init__()
        self.world, self.pauses = world, pauses
        self.lock = threading.RLock()
        world.calls.write([*world.calls.read(), {}])

    def enter(self, context: Any, name: str) -> str:
        """Counts the call and returns its user."""
        self.pauses.pass_by(name)
        with self.lock:
            calls = self.world.calls.read()
            calls[-1][name] = calls[-1].get(name, 0) + 1
            self.world.calls.write(calls)
        return str(dict(context.invocation_metadata())["x-user-id"])

    def version(self) -> str:
        promoted = [one["policy_version"] for one in self.world.rounds.read() if one["state"] == "promoted"]
        return promoted[-1] if promoted else "v0000"

    def begin(self, user: str, message: str) -> str:
        with self.lock:
            kept = self.world.conversations.read()
            number = max(map(int, kept), default=0) + 1
            self.world.conversations.write({**kept, str(number): [user, message]})
        return str(number)

    def Chat(self, request: Any, context: Any) -> Iterator[chat_pb2.ChatResponse]:
        user = self.enter(context, "Story" if STORY in request.message else "Chat")
        version, conversation_id = self.version(), self.begin(user, request.message)
        text = "Yes." if version != "v0000" else "It depends on many things."
        started = chat_pb2.ChatStarted(
            conversation_id=conversation_id, response_id=f"resp {conversation_id}", policy_version=version
        )
        yield chat_pb2.ChatResponse(started=started)
        yield chat_pb2.ChatResponse(delta=chat_pb2.ChatDelta(text=text))
        finished = chat_pb2.ChatFinished(
            text=text,
            finish_reason=FINISH_REASON_STOP,
            usage=Usage(completion_tokens=len(text.split())),
            policy_version=version,
        )
        yield chat_pb2.ChatResponse(finished=finished)

    def Compare(self, request: Any, context: Any) -> Iterator[chat_pb2.CompareResponse]:
        conversation_id = self.begin(self.enter(context, "Compare"), request.message)
        started = chat_pb2.CompareStarted(conversation_id=conversation_id, comparison_id=f"cmp {conversation_id}")
        yield chat_pb2.CompareResponse(started=started)
        for slot, text in ((SLOT_A, "It depends."), (SLOT_B, "Yes.")):
            finished = chat_pb2.CompareFinished(slot=slot, text=text, finish_reason=FINISH_REASON_STOP)
            yield chat_pb2.CompareResponse(finished=finished)

    def SubmitChoice(self, request: Any, context: Any) -> feedback_pb2.SubmitChoiceResponse:
        self.enter(context, "SubmitChoice")
        with self.lock:
            self.world.votes.write([*self.world.votes.read(), request.comparison_id])
            self.decide_canary()
        self.pauses.pass_by("voted")
        return feedback_pb2.SubmitChoiceResponse(
            feedback=feedback_pb2.Feedback(feedback_id=f"fb {request.comparison_id}", choice=request.choice)
        )

    def decide_canary(self) -> None:
        """Promotes the version that waits after three choices on its pairs."""
        rounds, decided = self.world.rounds.read(), self.world.votes.read().count("cmp") >= CANARY_CHOICES
        if decided and rounds[-1]["state"] == "canary":
            self.world.rounds.write([*rounds[:-1], {**rounds[-1], "state": "promoted", "reason": "It was preferred."}])

    def GetReview(self, request: Any, context: Any) -> review_pb2.GetReviewResponse:
        self.enter(context, "GetReview")
        waits = self.world.rounds.read()[-1]["state"] == "canary"
        return review_pb2.GetReviewResponse(review=self.reviews[0] if waits else None)

    def ListFeedback(self, request: Any, context: Any) -> feedback_pb2.ListFeedbackResponse:
        self.enter(context, "ListFeedback")
        cast = [feedback_pb2.Feedback(comparison_id=vote) for vote in self.world.votes.read()]
        return feedback_pb2.ListFeedbackResponse(feedback=cast)

    def ListConversations(self, request: Any, context: Any) -> chat_pb2.ListConversationsResponse:
        user = self.enter(context, "ListConversations")
        kept = [key for key, (owner, _) in self.world.conversations.read().items() if owner == user]
        return chat_pb2.ListConversationsResponse(
            conversations=[chat_pb2.Conversation(conversation_id=key) for key in kept]
        )

    def DeleteConversation(self, request: Any, context: Any) -> chat_pb2.DeleteConversationResponse:
        self.enter(context, "DeleteConversation")
        with self.lock:
            kept = self.world.conversations.read()
            del kept[request.conversation_id]
            self.world.conversations.write(kept)
        return chat_pb2.DeleteConversationResponse()

    def GetConversation(self, request: Any, context: Any) -> chat_pb2.GetConversationResponse:
        spans = [chat_pb2.VersionSpan(start=0, end=9, policy_version=self.version())]
        turn = chat_pb2.Turn(response=chat_pb2.Response(spans=spans))
        return chat_pb2.GetConversationResponse(conversation=chat_pb2.Conversation(turns=[turn]))

    def GetActivePolicy(self, request: Any, context: Any) -> policy_pb2.GetActivePolicyResponse:
        self.enter(context, "GetActivePolicy")
        version = self.version()
        return policy_pb2.GetActivePolicyResponse(
            policy=policy_pb2.Policy(version=version), replicas=[policy_pb2.Replica(loaded_version=version)]
        )

    def ListRounds(self, request: Any, context: Any) -> policy_pb2.ListRoundsResponse:
        rounds = []
        for kept in reversed(self.world.rounds.read()):
            metrics = Struct()
            metrics.update(METRICS)
            state = policy_pb2.RoundState.Value(f"ROUND_STATE_{kept['state'].upper()}")
            rounds.append(policy_pb2.Round(**{**kept, "state": state, "metrics": metrics}))
        return policy_pb2.ListRoundsResponse(rounds=rounds)


def serve(data_dir: Path) -> None:
    """Fakes `server serve`. FAKE_REFUSAL makes its start fail with that message, FAKE_SILENT makes it start for ever,
    and FAKE_END sets its exit status."""
    pauses = Pauses()
    print("Loading shards: 100%", flush=True)
    print("starting the engine", flush=True)
    pauses.pass_by("start")
    if refusal := os.environ.get("FAKE_REFUSAL"):
        sys.exit(refusal)
    if os.environ.get("FAKE_SILENT"):
        signal.sigwait([signal.SIGTERM])
        sys.exit(1)
    with serving(Service(World(data_dir), pauses)) as port:
        print(f"serving v0000 on 127.0.0.1:{port}", flush=True)
        signal.sigwait([signal.SIGTERM])
        if os.environ.get("FAKE_END"):
            sys.exit(int(os.environ["FAKE_END"]))


def learn(data_dir: Path, report: Path) -> None:
    """Fakes `learner run-once`: resumes a round that was stopped, and does nothing without new votes. FAKE_ROUNDS gives
    the outcome of each round."""
    world, pauses = World(data_dir), Pauses()

    def note(what: str) -> None:
        world.learner.write([*world.learner.read(), what])

    def end(state: str, sentence: str, code: int = 0) -> None:
        report.write_text(json.dumps({"state": state, "sentence": sentence}), encoding="utf-8")
        sys.exit(code)

    rounds, votes = world.rounds.read(), len(world.votes.read())
    note(f"started with {votes} votes")
    pauses.pass_by("learner")
    if rounds and rounds[-1]["state"] == "running":
        current = rounds.pop()
        print(f"resuming {current['round_id']} after its stage {current['stage']}", flush=True)
        note(f"resumed {current['round_id']}")
    elif rounds and rounds[-1].get("reward_model_version") == str(votes):
        end("nothing", "There are no new votes.")
    else:
        current = {"round_id": f"round_{len(rounds) + 1}", "state": "running", "stage": "snapshot"}
        note(f"began {current['round_id']}")
    for stage in ("improve", "gate"):
        world.rounds.write([*rounds, {**current, "stage": stage}])
        print(f"improving the policy (PPO): {len(stage)} of 5, 31 s so far", flush=True)
        pauses.pass_by(stage)
    prompts = sorted(message for _, message in world.conversations.read().values() if STORY not in message)
    note(f"practised on {prompts}")
    state = os.environ.get("FAKE_ROUNDS", "promoted").split()[len(rounds)]
    if state == "failed":
        world.rounds.write([*rounds, {**current, "stage": "gate", "state": "failed"}])
        end("failed", "The disk is full.", 1)
    ended = {"state": state, "stage": "activate", "reason": f"It was {state}.", "reward_model_version": str(votes)}
    version = {"policy_version": f"v000{len(rounds) + 1}"}
    world.rounds.write([*rounds, {**current, **ended, **version}])
    note(f"ended {current['round_id']}")
    print("judging candidates: 61.0 s", flush=True)
    pauses.pass_by("ended")
    end(state, ended["reason"])


def main() -> None:
    """Both commands, by their flags."""
    flags = dict(itertools.pairwise(sys.argv[2:]))
    data_dir = Path(flags["--data-dir"])
    if sys.argv[1] == "serve":
        # A server that pauses for ever must end at once on SIGTERM; any other ends in order.
        signal.pthread_sigmask(signal.SIG_BLOCK, [] if os.environ.get("FAKE_PAUSE") else [signal.SIGTERM])
        serve(data_dir)
    elif sys.argv[1] == "doctor":
        if os.environ.get("FAKE_NO_DOCTOR"):
            sys.exit("No such command 'doctor'.")
        print(json.dumps(DOCTOR))
        sys.exit(1)
    else:
        learn(data_dir, Path(flags["--report"]))
