"""Comparisons to vote on, sampled once by a real server, and data directories with simulated votes."""

import json
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefloop.v1.chat_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from prefloop.v1.feedback_pb2 import CHOICE_A, CHOICE_B, CHOICE_TIE

from clients import Client
from clients.demo.processes import Server
from clients.demo.questions import questions
from clients.demo.voter import FLIPPED, TASTES, Answer, compare
from server.store.chats.records import Choice
from server.store.store import Store

TOKENS = 64
USERS = 20
STREAMS = 16
# Questions whose comparisons get no votes: the reward model and the policy are tested on them.
UNSEEN = 96
# Comparisons for each of the other questions; the largest cell needs a thousand.
REPEATS = 3
CHOICES: dict[int, Choice] = {CHOICE_A: "A", CHOICE_B: "B", CHOICE_TIE: "TIE"}


def shown(answer: Any) -> Answer:
    """What a voter sees of a stored response or a sampled answer."""
    reason = FINISH_REASON_STOP if answer.finish_reason == "stop" else FINISH_REASON_LENGTH
    return Answer(answer.text, reason, len(answer.token_ids))


@dataclass(frozen=True)
class Pair:
    """One comparison; `seen`: whether it may get votes."""

    comparison_id: str
    user: str
    a: Answer
    b: Answer
    seen: bool


@dataclass(frozen=True)
class Cell:
    """A taste, the number of votes, the share of flipped votes, and a seed for all random draws. `shuffle` above 0
    assigns the same votes to other comparisons at random, which makes them uninformative."""

    taste: str
    votes: int
    flips: float
    seed: int
    shuffle: int = 0

    @property
    def name(self) -> str:
        return f"{self.taste}-{self.votes}-{self.flips:g}-{self.seed}" + (
            f"-shuffled{self.shuffle}" * bool(self.shuffle)
        )


def make_pool(model: str, work: Path, say: Callable[[str], None]) -> list[Pair]:
    """Every comparison that any cell votes on or is tested on; cached in `work`."""
    kept = work / "pool.jsonl"
    if kept.exists():
        return [_pair(json.loads(line)) for line in kept.read_text().splitlines()]
    data = work / "pool"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    asked = questions(0)
    jobs = [(question, False) for question in asked[:UNSEEN]]
    jobs += [(question, True) for question in asked[UNSEEN:] * REPEATS]
    server = Server(data, model, say)
    server.start()
    with server, ExitStack() as stack, ThreadPoolExecutor(STREAMS) as threads:
        clients = [stack.enter_context(Client(server.address, user=f"voter{number}")) for number in range(USERS)]

        def ask(number: int) -> Pair:
            question, seen = jobs[number]
            comparison_id, a, b = compare(clients[number % USERS], question, TOKENS)
            if number % 100 == 0:
                say(f"pool: {number} of {len(jobs)} comparisons")
            return Pair(comparison_id, f"voter{number % USERS}", a, b, seen)

        pairs = list(threads.map(ask, range(len(jobs))))
    staging = kept.with_suffix(".partial")
    staging.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    staging.rename(kept)
    return pairs


def _pair(line: dict[str, Any]) -> Pair:
    return Pair(**{**line, "a": Answer(**line["a"]), "b": Answer(**line["b"])})


def votes_of(cell: Cell, pairs: list[Pair]) -> list[tuple[Pair, Choice]]:
    """The votes of the cell, in order."""
    chance = random.Random(f"{cell.taste} {cell.votes} {cell.seed}")
    chosen = chance.sample([pair for pair in pairs if pair.seen], cell.votes)
    said = []
    for pair in chosen:
        choice = TASTES[cell.taste].choice(pair.a, pair.b)
        said.append(CHOICES[FLIPPED[choice] if chance.random() < cell.flips else choice])
    if cell.shuffle:
        random.Random(cell.shuffle).shuffle(said)
    return list(zip(chosen, said, strict=True))


def make_data(work: Path, data: Path, cell: Cell, pairs: list[Pair], cast: int | None = None) -> None:
    """Creates a data directory with only the conversations that the cell votes on, and the first `cast` of the votes,
    or all."""
    votes = votes_of(cell, pairs)
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(work / "pool", data, ignore=shutil.ignore_patterns("policies", "*.log"))
    shutil.copytree(work / "pool" / "policies", data / "policies", copy_function=os.link)
    voted = {pair.comparison_id for pair, _ in votes}
    store = Store.open(data)
    with store.transaction():
        for pair in pairs:
            if pair.comparison_id not in voted:
                conversation_id = store.responses.comparison(pair.user, pair.comparison_id).conversation_id
                store.conversations.delete(pair.user, conversation_id)
        for pair, choice in votes[:cast]:
            store.feedback.submit_choice(pair.user, pair.comparison_id, choice)
    store.close()


def cast_rest(data: Path, cell: Cell, pairs: list[Pair], cast: int) -> None:
    """Casts the cell's votes after the first `cast`."""
    store = Store.open(data)
    with store.transaction():
        for pair, choice in votes_of(cell, pairs)[cast:]:
            store.feedback.submit_choice(pair.user, pair.comparison_id, choice)
    store.close()
