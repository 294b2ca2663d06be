"""How often the signal test finds a signal where there is none, and where there is one.

    python benchmarks/signal_levels.py MODEL --work-dir DIR [--sets 1000] [--nights] [--write]

Uses the pool of `benchmarks/study.py` (the same --work-dir): real answers with the features that a round sees. Votes on
them are simulated, in several ways that say nothing about the answers and some that do:
- level: the share of sets of meaningless votes with p at or below 0.05 and 0.02.
- power: the same for votes by the tastes of `clients.demo.voter`, a tenth flipped; thumbs are up above a quantile of
  the taste's score.
- with `--nights`: votes come in night by night, and each night all are tested. The share of services with meaningless
  votes that ever pass, and the votes after which those with a taste do.
- enough: how many votes a test that was not passed says would suffice, against the number at which 80 % pass.
Each cell is saved as it ends. Prints one JSON line last; `--write` writes docs/benchmarks/signal.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from kept import kept
from pool import USERS, Pair, make_pool
from study import features_of
from torch import Tensor

from clients.demo.voter import TASTES
from learner.model.features import FeatureSpec
from learner.reward.dataset import Dataset, of_groups, select
from learner.reward.likelihood import TIE, A, B
from learner.reward.linear_heads import VoteTensors
from learner.reward.sign_flips import signal_test
from learner.settings import GateSettings, RewardSettings
from server.store.learning.round_metrics import SignalTest

FLIPS, TIES, CORRECTIONS = 0.1, 0.1, 30
SETTINGS = RewardSettings()
ERROR = GateSettings().signal_p
FIRST, EACH_NIGHT, NIGHTS = 40, 20, 18
NO_ROWS = torch.zeros(0, dtype=torch.long)
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "signal.md"


@dataclass(frozen=True)
class Answers:
    """Every answer of the pool, by pairs: features (2 P, F) and temperatures (2 P,); rows 2 i and 2 i + 1 are a pair.
    `scores` (2 P,) by taste."""

    features: Tensor
    spec: FeatureSpec
    temperature: Tensor
    scores: dict[str, Tensor]


Simulate = Callable[[Answers, int, torch.Generator], tuple[VoteTensors, list[str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--nights", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, sets = arguments.work_dir.resolve(), arguments.sets
    answers = read_answers(work, make_pool(arguments.model, work, lambda line: print(line, file=sys.stderr)))
    results: dict[str, dict[str, Any]] = {"level": {}, "power": {}, "nightly": {}}
    for name, simulate in NULLS.items():
        for votes in (40, 100):
            cell = partial(shares, answers, simulate, votes, sets)
            results["level"][f"{name}, {votes}"] = kept(path(work, sets, f"level-{name}-{votes}"), cell)
    for kind, simulates in SIGNALS.items():
        for votes in (40, 60, 100, 200):
            for taste in TASTES:
                cell = partial(shares, answers, partial(simulates, taste), votes, sets // len(TASTES))
                results["power"][f"{kind}, {taste}, {votes}"] = kept(path(work, sets, f"{kind}-{taste}-{votes}"), cell)
    by_night: dict[str, Simulate] = {"coin": coin, **{taste: partial(choices, taste) for taste in TASTES}}
    for name, simulate in by_night.items() if arguments.nights else ():
        cell = partial(nightly, answers, simulate, sets // (10 if name == "coin" else 50))
        results["nightly"][name] = kept(path(work, sets, f"nightly-{name}"), cell)
    if arguments.write:
        REPORT.write_text(page(results, sets), encoding="utf-8")
    print(json.dumps({"benchmark": "signal_levels", "sets": sets, "results": results}))


def path(work: Path, sets: int, name: str) -> Path:
    return work / "results" / f"signal-{sets}" / f"{name}.json"


def read_answers(work: Path, pairs: list[Pair]) -> Answers:
    from server.store.store import Store

    seen = [pair for pair in pairs if pair.seen]
    store = Store.open(work / "pool")
    stored = [store.responses.comparison(pair.user, pair.comparison_id) for pair in seen]
    store.close()
    both = [one for c in stored for one in (c.a, c.b)]
    features, spec = features_of(work, [(one.prompt_token_ids, one.token_ids) for one in both])
    said = [answer for pair in seen for answer in (pair.a, pair.b)]
    scores = {name: torch.tensor([taste.score(answer) for answer in said]) for name, taste in TASTES.items()}
    return Answers(features, spec, torch.tensor([one.temperature for one in both]), scores)


# Votes that say nothing


def coin(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    return won_by(answers, votes, chance, lambda difference: torch.full_like(difference, 0.5))


def hotter_loses(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    return won_by(answers, votes, chance, lambda difference: torch.where(difference > 0, 0.1, 0.9))


def hotter_wins(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    return won_by(answers, votes, chance, lambda difference: torch.where(difference > 0, 0.9, 0.1))


def always_a(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    return won_by(answers, votes, chance, lambda difference: torch.full_like(difference, 0.97))


def long_conversation(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    """Half of the votes are in one conversation, and four in five of them name the same slot."""
    found, _ = coin(answers, votes, chance)
    half = votes // 2
    whim = int(torch.randint(2, (1,), generator=chance))
    said = torch.where(torch.rand(half, generator=chance) < 0.8, whim, 1 - whim)
    group = torch.cat([torch.zeros(half, dtype=torch.long), torch.arange(1, votes - half + 1)])
    return replace(found, outcome=torch.cat([said, found.outcome[half:]]), choice_group=group), names(group, chance)


def coin_and_corrections(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    """Corrections that all say the same: the answer of the pair with more in feature 0. The test leaves them out."""
    found, conversations = coin(answers, votes, chance)
    pairs = 2 * torch.randperm(len(answers.features) // 2, generator=chance)[:CORRECTIONS]
    first = answers.features[pairs, 0] > answers.features[pairs + 1, 0]
    corrected = torch.where(first, pairs, pairs + 1)
    every = replace(
        found,
        a=torch.cat([found.a, corrected]),
        b=torch.cat([found.b, 4 * (pairs // 2) + 1 - corrected]),
        outcome=torch.cat([found.outcome, torch.zeros_like(pairs)]),
        temperature_difference=torch.cat([found.temperature_difference, torch.zeros(CORRECTIONS)]),
        choice_weight=torch.ones(votes + CORRECTIONS),
        choice_group=torch.arange(votes + CORRECTIONS),
    )
    conversations += names(torch.arange(CORRECTIONS), chance)
    compared = torch.arange(votes + CORRECTIONS) < votes
    trains = torch.zeros(votes + CORRECTIONS, dtype=torch.bool)
    return Dataset([], every, conversations, trains, [], [], torch.zeros(0), compared, torch.ones(0), ~compared).shown


def mostly_up(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    users = torch.randint(USERS, (votes,), generator=chance)
    return thumbs_up(answers, votes, users, torch.full((votes,), 0.9), chance)


def own_rates(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    """Users from grumpy to easily pleased."""
    users = torch.randint(USERS, (votes,), generator=chance)
    return thumbs_up(answers, votes, users, 0.05 + 0.9 * torch.rand(USERS, generator=chance)[users], chance)


def habits_and_topics(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    """Users who are always or never pleased, and each of whom asks about one thing: neighbours in the pool."""
    found, conversations = own_rates(answers, votes, chance)
    order = answers.features[:, 0].argsort()
    start = torch.randint(len(order) - votes, (USERS,), generator=chance)
    rows = order[start[found.user] + torch.randint(votes, (votes,), generator=chance)]
    pleased = torch.randint(2, (USERS,), generator=chance)[found.user]
    return replace(found, response=rows, thumb=2.0 * pleased - 1), conversations


def one_thumb_each(answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    return thumbs_up(answers, votes, torch.arange(votes), torch.full((votes,), 0.6), chance)


NULLS: dict[str, Simulate] = {
    "coin": coin,
    "hotter loses": hotter_loses,
    "hotter wins": hotter_wins,
    "always A": always_a,
    "one long conversation": long_conversation,
    "coin and 30 corrections": coin_and_corrections,
    "mostly-up thumbs": mostly_up,
    "users' own rates of up": own_rates,
    "always or never up, own topics": habits_and_topics,
    "one thumb a person": one_thumb_each,
}


# Votes by a taste


def choices(taste: str, answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    found, conversations = coin(answers, votes, chance)
    first, second = answers.scores[taste][found.a], answers.scores[taste][found.b]
    flipped = torch.rand(votes, generator=chance) < FLIPS
    said = torch.where((first > second) != flipped, A, B)
    return replace(found, outcome=torch.where(first == second, TIE, said)), conversations


def one_thumb_by(taste: str, answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    return thumbs_up(answers, votes, torch.arange(votes), likes(answers.scores[taste], 0.5), chance)


def mostly_up_by(taste: str, answers: Answers, votes: int, chance: torch.Generator) -> tuple[VoteTensors, list[str]]:
    users = torch.randint(USERS, (votes,), generator=chance)
    return thumbs_up(answers, votes, users, likes(answers.scores[taste], 0.1), chance)


SIGNALS: dict[str, Callable[..., tuple[VoteTensors, list[str]]]] = {
    "choices": choices,
    "one thumb a person": one_thumb_by,
    "thumbs, nine in ten up": mostly_up_by,
}


def likes(scores: Tensor, quantile: float) -> Tensor:
    """(2 P,) the probability of a thumb up on each answer. A quantile of equal scores is one of them: then half a
    unit decides."""
    order = (scores + 1e-6 * torch.rand(len(scores), generator=torch.Generator().manual_seed(0))).argsort().argsort()
    return torch.where(order >= quantile * len(scores), 1 - FLIPS / 2, FLIPS / 2)


def won_by(
    answers: Answers, votes: int, chance: torch.Generator, of_difference: Callable[[Tensor], Tensor]
) -> tuple[VoteTensors, list[str]]:
    """Choices, each in a conversation of its own; `of_difference` is how likely A wins at a temperature difference."""
    pairs = 2 * torch.randperm(len(answers.features) // 2, generator=chance)[:votes]
    second = torch.randint(2, (votes,), generator=chance)
    a, b = pairs + second, pairs + 1 - second
    difference = answers.temperature[a] - answers.temperature[b]
    said = torch.where(torch.rand(votes, generator=chance) < of_difference(difference), A, B)
    outcome = torch.where(torch.rand(votes, generator=chance) < TIES, TIE, said)
    none = torch.zeros(0)
    group = torch.arange(votes)
    return VoteTensors(
        a, b, outcome, difference, torch.ones(votes), group, NO_ROWS, none, NO_ROWS, none, NO_ROWS, 1
    ), names(group, chance)  # fmt: skip


def thumbs_up(
    answers: Answers, votes: int, users: Tensor, rate: Tensor, chance: torch.Generator
) -> tuple[VoteTensors, list[str]]:
    """Thumbs, each in a conversation of its own; `rate` (V,) or (2 P,), by answer, is how likely one is up."""
    rows = torch.randperm(len(answers.features), generator=chance)[:votes]
    rate = rate if len(rate) == votes else rate[rows]
    thumb = torch.where(torch.rand(votes, generator=chance) < rate, 1.0, -1.0)
    none = torch.zeros(0)
    group = torch.arange(votes)
    return VoteTensors(
        NO_ROWS, NO_ROWS, NO_ROWS, none, none, NO_ROWS, rows, thumb, users, torch.ones(votes), group,
        int(users.max()) + 1,
    ), names(group, chance)  # fmt: skip


def names(group: Tensor, chance: torch.Generator) -> list[str]:
    """New ids of conversations, which decide their signs."""
    drawn = torch.randint(2**62, (int(group.max()) + 1,), generator=chance)
    return [f"conv-{number}" for number in drawn.tolist()]


# Measuring


def shares(answers: Answers, simulate: Simulate, votes: int, sets: int) -> dict[str, float]:
    """The shares of p-values at or below .05 and .02, and the median of `enough_votes` of those above .02."""
    tests = []
    for number in range(sets):
        chance = torch.Generator().manual_seed(number)
        found, conversations = simulate(answers, votes, chance)
        tests.append(signal_test(answers.features, found, conversations, answers.spec, SETTINGS, 2 * ERROR, None))
    weak = [test.enough_votes or float("inf") for test in tests if not test.passed]
    return {
        "0.05": mean(test.p_value <= 0.05 for test in tests),
        "0.02": mean(test.p_value <= 0.02 for test in tests),
        "enough": median(weak) if weak else 0.0,
    }


def nightly(answers: Answers, simulate: Simulate, services: int) -> dict[str, Any]:
    """The votes after which each service passes, 0 for never: with one error for all nights, and with one for each."""
    shared, fresh = [], []
    for number in range(services):
        chance = torch.Generator().manual_seed(10_000 + number)
        found, conversations = simulate(answers, FIRST + EACH_NIGHT * NIGHTS, chance)
        shared.append(first_pass(answers, found, conversations, together=True))
        fresh.append(first_pass(answers, found, conversations, together=False))
    return {"shared": shared, "fresh": fresh}


def first_pass(answers: Answers, found: VoteTensors, conversations: list[str], *, together: bool) -> int:
    earlier: SignalTest | None = None
    for night in range(NIGHTS + 1):
        count = FIRST + EACH_NIGHT * night
        until = torch.arange(len(conversations)) < count
        votes, ids = select(found, until), of_groups(conversations, until)
        error = ERROR if together else 2 * ERROR
        test = signal_test(answers.features, votes, ids, answers.spec, SETTINGS, error, earlier)
        if test.passed:
            return count
        earlier = test if together else None
    return 0


def page(results: dict[str, dict[str, Any]], sets: int) -> str:
    lines = [
        "# How often the signal test errs, and how often it sees",
        "",
        f"`python benchmarks/signal_levels.py --write`, {datetime.now(UTC):%Y-%m-%d}: simulated votes on real answers,",
        f"{sets} sets of votes for each level, {sets // len(TASTES)} for each taste's power. The program's docstring",
        "describes the votes.",
        "",
        "Votes that say nothing: the share of sets with p at or below 0.05, and 0.02.",
        "",
        "| votes | 40 | 100 |",
        "|---|---:|---:|",
    ]
    for name in NULLS:
        cells = [results["level"][f"{name}, {votes}"] for votes in (40, 100)]
        lines.append(f"| {name} | " + " | ".join(f"{cell['0.05']:.3f}, {cell['0.02']:.3f}" for cell in cells) + " |")
    lines += [
        "",
        "Votes by a taste, a tenth flipped: likewise. In brackets the votes that would suffice, as the median of the",
        "tests above 0.02 says.",
        "",
        "| votes | taste | 40 | 60 | 100 | 200 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for kind in SIGNALS:
        for taste in TASTES:
            cells = [results["power"][f"{kind}, {taste}, {votes}"] for votes in (40, 60, 100, 200)]
            lines.append(f"| {kind} | {taste} | " + " | ".join(map(power_cell, cells)) + " |")
        means = [
            mean(results["power"][f"{kind}, {taste}, {votes}"][level] for taste in TASTES)
            for votes in (40, 60, 100, 200)
            for level in ("0.05", "0.02")
        ]
        pairs = zip(means[::2], means[1::2], strict=True)
        lines.append(f"| {kind} | mean | " + " | ".join(f"{five:.2f}, {two:.2f}" for five, two in pairs) + " |")
    if results["nightly"]:
        lines += nights(results["nightly"])
    return "\n".join(lines) + "\n"


def nights(nightly: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"Night by night: {FIRST} votes, then {EACH_NIGHT} more each night for {NIGHTS} nights. The share of services",
        f"that ever pass, and the median of the votes after which they do: with an error of {ERROR:g} for all nights",
        f"together, and with {ERROR:g} for each.",
        "",
        "| votes | services | together | each |",
        "|---|---:|---:|---:|",
    ]
    for name, found in nightly.items():
        both = " | ".join(nightly_cell(found[kind]) for kind in ("shared", "fresh"))
        lines.append(f"| {name} | {len(found['shared'])} | {both} |")
    return lines


def power_cell(cell: dict[str, float]) -> str:
    enough = "" if cell["0.02"] > 0.95 or cell["enough"] > 10_000 else f" ({cell['enough']:.0f})"
    return f"{cell['0.05']:.2f}, {cell['0.02']:.2f}{enough}"


def nightly_cell(passed: list[int]) -> str:
    votes = [count for count in passed if count]
    return f"{mean(count > 0 for count in passed):.3f}" + (f", {median(votes):.0f} votes" if votes else "")


if __name__ == "__main__":
    main()
