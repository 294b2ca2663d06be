"""How often the A/B test rolls back a version that is as good as the one before it, and one that is worse; and how
often people's choices promote and reject a canary.

    python benchmarks/ab_test_levels.py [--tests 2000]

Simulates tests at the shipped defaults with 1, 3, 10 and 100 voters, each of whom casts up to 40 votes, in random order
and in unequal numbers. People may differ: half of them prefer the new version more than the mean of all, half less. The
votes are counted as `server.store.learning.lineage` counts them; for comparison, as it did before: up to ten votes of
each. A canary is promoted or rejected at its evidence, or promoted by all choices at the end, or undecided. Prints two
tables, and one JSON line last.
"""

import argparse
import json
import random
from collections import Counter
from functools import cache

from learner.round.review.canary import EARLY
from learner.settings import GateSettings
from server.settings import ServerSettings
from server.store.e_value import STAKES, chance_of, e_value

VOTERS, MOST = (1, 3, 10, 100), 40
# (name, mean of the people's rates of preferring the new version, how far the rates are spread to either side).
KINDS = (
    ("equal, people alike", 0.5, 0.0),
    ("equal, people differ", 0.5, 0.4),
    ("worse, people alike", 0.3, 0.0),
    ("worse, people differ", 0.3, 0.3),
    ("much worse, people alike", 0.15, 0.0),
)
CANARY_VOTERS = (1, 3, 10, 20, 40, 100)
CANARIES = (
    ("as good, people alike", 0.5, 0.0),
    ("as good, people differ", 0.5, 0.4),
    ("preferred in 60 %", 0.6, 0.0),
    ("preferred in 70 %", 0.7, 0.0),
    ("preferred in 70 %, people differ", 0.7, 0.25),
    ("preferred in 80 %", 0.8, 0.0),
    ("preferred in 30 %", 0.3, 0.0),
)
evidence = cache(e_value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=2000)
    tests = parser.parse_args().tests
    defaults = ServerSettings.from_values({})
    limit, few, several = 1 / defaults.ab_test_alpha, defaults.ab_test_voters, defaults.ab_test_user_votes
    rules = {
        "now": {voters: 1 if voters >= few else several if voters > 1 else MOST for voters in VOTERS},
        "ten of each": dict.fromkeys(VOTERS, 10),
    }
    results = {}
    print("| version | votes that count | " + " | ".join(f"{n} voters" for n in VOTERS) + " |")
    print("|---|---|" + "---:|" * len(VOTERS))
    for name, rate, spread in KINDS:
        for rule, counted in rules.items():
            shares = []
            for voters in VOTERS:
                chance = random.Random(f"{name} {voters}")
                lost = sum(loses(chance, voters, rate, spread, counted[voters], limit) for _ in range(tests))
                shares.append(lost / tests)
            results[f"{name}, {rule}"] = shares
            print(f"| {name} | {rule} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    canaries = {}
    print("\n| canary | " + " | ".join(f"{n} voters" for n in CANARY_VOTERS) + " |")
    print("|---|" + "---:|" * len(CANARY_VOTERS))
    for name, rate, spread in CANARIES:
        outcomes = []
        for voters in CANARY_VOTERS:
            chance = random.Random(f"canary {name} {voters}")
            ends = Counter(canary(chance, voters, rate, spread, several) for _ in range(tests))
            outcomes.append((ends["promoted"] / tests, ends["rejected"] / tests))
        canaries[name] = outcomes
        print(f"| {name} | " + " | ".join(f"{yes:.3f}, {no:.3f}" for yes, no in outcomes) + " |")
    found = {"rolled_back": results, "canary_voters": CANARY_VOTERS, "promoted_rejected": canaries}
    print(json.dumps({"benchmark": "ab_test_levels", "tests": tests, "voters": VOTERS, **found}))


def canary(chance: random.Random, voters: int, rate: float, spread: float, several: int) -> str:
    """What people decide about a canary that they prefer at `rate`: "promoted", "rejected" or "undecided"."""
    gate = GateSettings()
    sides = [spread, -spread] * (voters // 2) + [0.0] * (voters % 2)
    people = [
        (rate + side, 1 + int(MOST * chance.random() ** 2) if voters > 1 else gate.canary_votes) for side in sides
    ]
    few = voters < gate.canary_voters
    unit, most = (1, several if voters > 1 else gate.canary_votes) if few else (gate.canary_user_votes,) * 2
    won = [list[float]() for _ in people]
    better, worse, counted, means = [1.0] * len(STAKES), [1.0] * len(STAKES), 0, list[float]()
    order = [person for person, (_, votes) in enumerate(people) for _ in range(min(votes, most))]
    chance.shuffle(order)
    for person in order:
        won[person].append(float(chance.random() < people[person][0]))
        if len(won[person]) % unit == 0:
            mean, counted = sum(won[person][-unit:]) / unit - 0.5, counted + unit
            means.append(mean + 0.5)
            better = [wealth * (1 + stake * mean) for wealth, stake in zip(better, STAKES, strict=True)]
            worse = [wealth * (1 - stake * mean) for wealth, stake in zip(worse, STAKES, strict=True)]
        if sum(better) / len(STAKES) >= gate.canary_evidence / EARLY:
            return "promoted"
        if sum(worse) / len(STAKES) >= gate.canary_evidence / EARLY:
            return "rejected"
        if counted >= gate.canary_votes:
            break
    return "promoted" if chance_of(means) <= (1 - EARLY) / gate.canary_evidence else "undecided"


def loses(chance: random.Random, voters: int, rate: float, spread: float, counted: int, limit: float) -> bool:
    """Whether the new version is rolled back before all have voted."""
    sides = [spread, -spread] * (voters // 2) + [0.0] * (voters % 2)
    people = [(rate + side, 1 + int(MOST * chance.random() ** 2)) for side in sides]
    said = Counter[int]()
    wins = losses = 0
    order = [person for person, (_, votes) in enumerate(people) for _ in range(votes if voters > 1 else MOST)]
    chance.shuffle(order)
    for person in order:
        said[person] += 1
        if said[person] > counted:
            continue
        if chance.random() < people[person][0]:
            wins += 1
        else:
            losses += 1
        if evidence(wins, losses) >= limit:
            return True
    return False


if __name__ == "__main__":
    main()
