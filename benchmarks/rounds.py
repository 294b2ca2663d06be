"""Whether a service keeps learning: several rounds one after another, on simulated voters.

    python benchmarks/rounds.py MODEL --work-dir DIR [--hours 8] [--only CELL...] [--write]

A cell is a taste (`clients.demo.voter`), a seed and an arm. In the arm `rounds`, voters compare pairs of answers of the
version that serves and a tenth of their choices is flipped; then `learner run-once` runs as an operator runs it. If its
candidate waits as a canary, the same voters compare the pairs that it offers until the server's rule decides. This is
done four times; before the Nth, voters have compared N * 150 pairs, those of canaries included. In the arm `once`, they
compare 600 pairs of the reference's answers, and one round runs, with the furthest KL budget of the arm `rounds`. The
arm `active` is like `rounds`, but half of the votes of each round after the first are on pairs that the round before
offers because they would teach its reward model most (`review.active_pairs`). After each round the served version
answers 256 questions that nobody voted on; its win rate over the reference is by the taste itself, a draw is half.

A cell's data directory is kept and each of its rounds saved in docs/benchmarks/rounds.json, so that a killed run
resumes after the last saved one. `--write` writes docs/benchmarks/rounds.md from it. No round starts after `--hours`.
Prints one JSON line last.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree
from statistics import mean, stdev
from typing import Any

from kept import kept
from pool import shown
from study import run_json
from voted import VOTERS, cast, choose, make_data, scores, win_rate, wins

from clients.demo.questions import questions

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "rounds.json"
REPORT = RESULTS.with_suffix(".md")
ROUNDS, VOTES = 4, 150
TOKENS, UNSEEN = 64, 256
ARMS = ("rounds", "once", "active")


@dataclass(frozen=True)
class Cell:
    """A taste, a seed and an arm."""

    taste: str
    seed: int
    arm: str

    @property
    def name(self) -> str:
        return f"{self.taste}-{self.seed}-{self.arm}"


def cells() -> list[Cell]:
    """Two tastes and two seeds first, then the others."""
    tastes = ["gentle", "crisp", "to-you", "short"]
    order = [(taste, seed) for taste in tastes[:2] for seed in range(2)]
    order += [(taste, seed) for taste in tastes[:3] for seed in range(3) if (taste, seed) not in order]
    return [Cell(taste, seed, arm) for taste, seed in order for arm in ARMS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory, as in a data directory's policies/v0000")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", metavar="CELL", help="such as gentle-0-rounds")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--step", choices=["ask", "evaluate"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work: Path = arguments.work_dir.resolve()
    if arguments.step:
        [cell] = [cell for cell in cells() if cell.name == arguments.only[0]]
        found = ask(work / cell.name, cell) if arguments.step == "ask" else evaluate(work, cell)
        print(json.dumps(found))
        return
    end = time.monotonic() + arguments.hours * 3600
    results: dict[str, list[Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for cell in cells():
        if arguments.only and cell.name not in arguments.only:
            continue
        while len(results.get(cell.name, [])) < (1 if cell.arm == "once" else ROUNDS) and time.monotonic() < end:
            other = results.get(Cell(cell.taste, cell.seed, "rounds").name, [])
            if cell.arm == "once" and len(other) < ROUNDS:
                print(f"{cell.name} needs the KL budget of the {ROUNDS} rounds of the arm `rounds`.", file=sys.stderr)
                break
            done = results.setdefault(cell.name, [])
            done.append(one_round(work, cell, arguments.model, len(done), furthest_budget(other)))
            print(f"{cell.name}: {json.dumps(done[-1])}", file=sys.stderr, flush=True)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if arguments.write:
        REPORT.write_text("\n".join(page(results)) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "rounds", "results": results}))


def one_round(work: Path, cell: Cell, model: Path, number: int, kl_budget: float) -> dict[str, Any]:
    """Votes, a round, and what people decide about its canary; then how good the served version is. `kl_budget`, in
    nats, is what the arm `once` may use."""
    data = work / cell.name
    # A round that was killed begins again where the one before it ended.
    before = work / f"{cell.name}-{number}"
    if not before.exists():
        if number == 0:
            make_data(model, data)
        copytree(data, before)
    rmtree(data)
    copytree(before, data)
    step(work, cell, "ask")
    report = run_round(data, cell, kl_budget)
    canary = decide_canary(data, cell, number) if report["state"] == "canary" else None
    metrics = report["metrics"]
    gate = metrics.get("gate", {})
    return {
        "state": report["state"],
        "sentence": report["sentence"],
        "canary": canary,
        "minutes": round(sum(metrics["seconds"].values()) / 60, 1),
        "signal": metrics["signal"]["p_value"],
        "reward_model": metrics.get("reward_model", {}).get("accuracy"),
        "votes": metrics["votes"],
        "chosen": gate.get("chosen"),
        "kl_budget": metrics.get("improvement", {}).get("kl_budget"),
        **step(work, cell, "evaluate"),
    }


def furthest_budget(rounds: list[Any]) -> float:
    """The largest KL budget of rounds, in nats; 0 if none trained."""
    return max((one["kl_budget"] or 0.0 for one in rounds), default=0.0)


def step(work: Path, cell: Cell, name: str) -> dict[str, Any]:
    """Runs a step of this program in a separate process, which owns an engine."""
    return run_json([__file__, "-", "--work-dir", str(work), "--only", cell.name, "--step", name])


def run_round(data: Path, cell: Cell, kl_budget: float) -> dict[str, Any]:
    """Runs `learner run-once`; returns its report."""
    from learner.improve_settings import PolicySettings, PPOSettings

    budget = {}
    if cell.arm == "once":
        moved = max(kl_budget - PolicySettings().kl_budget, 0.0)
        budget = {
            "PREFLOOP_POLICY__KL_BUDGET": str(PolicySettings().kl_budget + moved),
            "PREFLOOP_PPO__KL_TARGET": str(PPOSettings().kl_target + moved),
        }
    command = ["-m", "learner.cli", "run-once", "--data-dir", str(data), "--seed", str(cell.seed), "--json"]
    people = {
        "PREFLOOP_GATE__CANARY": "off" if cell.arm == "once" else "on",
        "PREFLOOP_REVIEW__ACTIVE_PAIRS": str(VOTES // 2 if cell.arm == "active" else 0),
    }
    return run_json(command, PREFLOOP_GATE__KEEP_CANDIDATES="true", **people, **budget)


# Steps


def ask(data: Path, cell: Cell) -> dict[str, Any]:
    """Samples comparisons of the served version's answers and votes on them."""
    from server.store.store import Store

    store = Store.open(data)
    number = len(store.rounds.page())
    chance = random.Random(f"{cell.name} {number}")
    offered = compare_offered(store, cell, chance) if cell.arm == "active" else 0
    given = len(store.snapshots.take().choices)
    store.close()
    count = VOTES * (ROUNDS if cell.arm == "once" else number + 1) - given
    seen = questions(0)[UNSEEN:]
    cast(data, cell.taste, chance, [chance.choice(seen) for _ in range(count)], TOKENS, 2 * number)
    return {"asked": count, "offered": offered}


def compare_offered(store: Any, cell: Cell, chance: random.Random) -> int:
    """Voters compare the pairs that the last round offers, in turn, at most half of a round's votes; returns how
    many."""
    for number in range(VOTES // 2):
        if not compare_next(store, cell, chance, f"voter{number % VOTERS}"):
            return number
    return VOTES // 2


def compare_next(store: Any, cell: Cell, chance: random.Random, user: str) -> bool:
    """A voter compares the next pair that is offered to them; False if there is none."""
    review = store.reviews.next(user)
    if review:
        both = map(shown, (review.comparison.a, review.comparison.b))
        store.feedback.submit_choice(user, review.comparison.id, choose(cell.taste, chance, *both))
    return review is not None


def evaluate(work: Path, cell: Cell) -> dict[str, Any]:
    """How often the served version's answers to unseen questions are better than the reference's, by the taste."""
    from server.store.store import Store

    data, asked = work / cell.name, questions(0)[:UNSEEN]
    store = Store.open(data)
    version = store.policies.active().version
    store.close()
    before = kept(work / f"{cell.taste}-reference.json", partial(scores, data, "v0000", cell.taste, asked, TOKENS))
    after = before if version == "v0000" else scores(data, version, cell.taste, asked, TOKENS)
    digits = wins(after, before)
    return {"version": version, "win_rate": win_rate(digits), "wins": digits}


# Voters


def decide_canary(data: Path, cell: Cell, number: int) -> dict[str, Any]:
    """Voters compare the offered pairs, in turn, until the server's rule decides or nothing more would count."""
    from server.store.learning.canaries import decide
    from server.store.store import Store
    from server.versions.canary import ACTOR

    store = Store.open(data)
    canary, chance, choices = store.canaries.waiting(), random.Random(f"{cell.name} {number} canary"), 0
    assert canary
    # Nobody compares more than what counts.
    turns = iter([f"voter{place}" for _ in range(canary.user_votes) for place in range(VOTERS)])
    while True:
        user = next(turns, "")
        choices += compare_next(store, cell, chance, user) if user else False
        outcome, reason = decide(canary, store.canaries.result(canary), expired=not user)
        if outcome:
            break
    if outcome == "promoted":
        store.policies.activate(
            canary.version, actor=ACTOR, reason=reason, expected_active_version=canary.opponent_version
        )
    else:
        store.canaries.end(canary.version, "rejected", reason)
    store.close()
    return {"outcome": outcome, "reason": reason, "choices": choices}


# The page


def page(results: dict[str, list[Any]]) -> Iterator[str]:
    """Its lines."""
    yield "# Whether a service keeps learning"
    yield ""
    yield "`python benchmarks/rounds.py --write`: the program's docstring says what is done. The win rate over the"
    yield f"reference is on {UNSEEN} questions that nobody voted on, by the taste itself. *Since* is how far it is"
    yield "above that of the version served before, with the lower end of its paired 95 % interval. All rounds ran"
    yield "with the canary's last look (decision 54); seed 0 of the arm `once` is older."
    yield ""
    titles = ["taste", "seed", "arm", "round", "votes", "signal p", "reward model", "against the incumbent", "outcome"]
    yield f"| {' | '.join([*titles, 'win rate', 'since', 'KL', 'of at most', 'minutes'])} |"
    yield "|---|---:|---|---:|---:|---:|---:|---|---|---:|---:|---:|---:|---:|"
    for cell in cells():
        yield from rows(cell, results.get(cell.name, []))


def rows(cell: Cell, rounds: list[Any]) -> Iterator[str]:
    before = None
    for number, one in enumerate(rounds, start=1):
        chosen, votes = one["chosen"] or {}, one["votes"]
        against = chosen.get("against_incumbent")
        told = f"{against['rate']:.2f} [{against['low']:.2f}, {against['high']:.2f}]" if against else ""
        outcome = one["state"]
        if canary := one["canary"]:
            outcome = f"canary, {canary['outcome']} after {canary['choices']} choices"
        accuracy = "" if one["reward_model"] is None else f"{one['reward_model']:.2f}"
        kl = f"{chosen['kl']:.1f}" if chosen else ""
        budget = f"{one['kl_budget']:.1f}" if one["kl_budget"] else ""
        yield (
            f"| {cell.taste} | {cell.seed} | {cell.arm} | {number} | {votes['train'] + votes['judge']} | "
            f"{one['signal']:.3f} | {accuracy} | {told} | {outcome} | {one['win_rate']:.3f} | "
            f"{since(before, one['wins'])} | {kl} | {budget} | {one['minutes']:.0f} |"
        )
        before = one["wins"]


def since(before: str | None, after: str) -> str:
    """The mean difference over the questions, and the lower end of its 95 % interval."""
    if before is None:
        return ""
    changes = [(int(new) - int(old)) / 2 for new, old in zip(after, before, strict=True)]
    low = mean(changes) - 1.96 * stdev(changes) / len(changes) ** 0.5
    return f"{mean(changes):+.3f} [{low:+.3f}]"


if __name__ == "__main__":
    main()
