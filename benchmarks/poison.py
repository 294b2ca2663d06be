"""The cost of poisoned votes, with and without the learner's defences, for simulated voters of whom some are hostile.

    python benchmarks/poison.py MODEL --work-dir DIR [--write]

Uses the pool of `benchmarks/study.py` (the same --work-dir). Voters share a taste and flip a tenth of their votes; an
attack replaces some of them. As in a round, the votes of 40 % of the conversations are held out for judging. Each set
of votes is fitted three times:
- none: every vote has the same weight.
- cap: no user has more than `user_share` of the weight.
- full: the cap, and `weigh_voters` (learner/reward/voter_reliability.py).
Measured, as points lost against honest voters without defences, on the same comparisons:
- accuracy against the taste on comparisons without votes: those of the study's unseen questions and of HELD questions
  that are held out here.
- a cheap proxy for the result of PPO, not a policy's win rate: of four answers to a held question the one with the
  highest reward, against another answer; the taste decides who wins.
Each result is saved as it is computed, so that a killed benchmark resumes after the last one. Prints one JSON line
last; `--write` writes docs/benchmarks/poison.md.
"""

import argparse
import itertools
import json
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kept import kept
from planner import answers_by_question
from pool import REPEATS, make_pool
from study import accuracy, unseen

from clients.demo.voter import TASTES, words

HELD, SEEDS, JUDGES = 80, 4, 0.4
OTHER = {"to-you": "gentle", "gentle": "short", "short": "to-you", "crisp": "to-you"}
A, B, TIE = range(3)


@dataclass(frozen=True)
class Crowd:
    """A number of users, and the range of their numbers of votes."""

    users: int
    least: int
    most: int

    @property
    def name(self) -> str:
        return f"{self.users} users of {self.least} to {self.most} votes"


@dataclass(frozen=True)
class Attack:
    """The share of hostile users, or a single one; their votes, and how many times as many they cast as others; and the
    share of everybody's flips."""

    name: str
    share: float = 0.0
    one: bool = False
    says: str = "opposite"
    times: int = 1
    flips: float = 0.1


CROWDS = (Crowd(100, 5, 8), Crowd(40, 12, 17))
HONEST = Attack("honest")
ATTACKS = (
    HONEST,
    *(Attack(f"{share:.0%} say the opposite", share) for share in (0.01, 0.05, 0.2)),
    *(Attack(f"{share:.0%} want it longer", share, says="longer") for share in (0.01, 0.05, 0.2)),
    Attack("one says the opposite, 10 times as often", one=True, times=10),
    Attack("one always says A", one=True, says="A"),
    Attack("one always says A, 10 times as often", one=True, says="A", times=10),
    Attack("no flips", flips=0.0),
    Attack("25% flips", flips=0.25),
    Attack("20% have another taste", 0.2, says="other"),
)
# One percent of forty users is none.
CELLS = [(crowd, attack) for crowd in CROWDS for attack in ATTACKS if crowd.users >= 100 or "1%" not in attack.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as of the study")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    pairs = make_pool(arguments.model, work, lambda line: print(line, file=sys.stderr))
    _, features, spec = answers_by_question(work, pairs)
    tested = {taste: unseen(work, pairs, taste) for taste in TASTES}
    seen = [pair for pair in pairs if pair.seen]
    likes = {
        name: [liked(name, answer) for pair in seen for answer in (pair.a, pair.b)] for name in (*TASTES, "longer")
    }
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    # Seed by seed, so that a killed benchmark has results of every kind.
    for seed, (crowd, attack), taste in itertools.product(range(SEEDS), CELLS, TASTES):
        path = work / "results" / "poison" / f"{crowd.name}-{attack.name}-{taste}-{seed}.json".replace(" ", "_")
        run = partial(poisoned, features, spec, tested[taste], likes, crowd, attack, taste, seed)
        results.setdefault(crowd.name, {}).setdefault(attack.name, []).append(kept(path, run))
    if arguments.write:
        from poison_report import write_report

        write_report(results, HONEST.name)
    print(json.dumps({"benchmark": "poison", "results": results}))


def liked(taste: str, answer: Any) -> float:
    return float(len(words(answer.text))) if taste == "longer" else TASTES[taste].score(answer)


def poisoned(
    features: Any, spec: Any, tested: Any, likes: Any, crowd: Crowd, attack: Attack, taste: str, seed: int
) -> dict[str, Any]:
    """Accuracy and proxy of each defence, and the share of their weight that hostile and other users keep."""
    import torch

    from learner.reward.linear_reward_model import LinearRewardModel
    from learner.reward.vote_weights import vote_weights
    from learner.reward.voter_reliability import scaled, weigh_voters
    from learner.settings import RewardSettings

    settings = RewardSettings(fold_repeats=2, members=2)
    held, dataset, hostile = cast(likes, crowd, attack, taste, seed)
    ages = torch.zeros(len(dataset.voters))
    weights = vote_weights(ages, dataset.voters, settings.half_life_days, settings.age_floor, settings.user_share)
    capped = replace(dataset, votes=scaled(dataset.votes, weights))
    full, factors = weigh_voters(capped, features, spec, settings, torch.Generator().manual_seed(seed))
    found: dict[str, Any] = {"weight of hostile": None, "weight of others": float(factors[hostile:].mean())}
    if hostile:
        found["weight of hostile"] = float(factors[:hostile].mean())
    fitted: list[tuple[Any, dict[str, float]]] = []
    for name, one in (("none", dataset), ("cap", capped), ("full", full)):
        weight = one.train.choice_weight
        same = [figures for other, figures in fitted if torch.allclose(other, weight, atol=1e-6)]
        if not same:
            model = LinearRewardModel.fit(features, one.train, spec, settings, torch.Generator().manual_seed(seed))
            same = [measured(model, features, tested, held, likes[taste])]
        fitted.append((weight, same[0]))
        found[name] = same[0]
    return found


def cast(likes: Any, crowd: Crowd, attack: Attack, taste: str, seed: int) -> tuple[list[int], Any, int]:
    """The held questions, the votes, and the number of hostile users, who come first. Comparisons, flips and judges
    depend only on taste and seed, so that attacks differ in nothing else."""
    chance = random.Random(f"{crowd.name} {taste} {seed}")
    comparisons = len(likes[taste]) // 2
    questions = comparisons // REPEATS
    held = chance.sample(range(questions), HELD)
    free = [number for number in range(comparisons) if number % questions not in set(held)]
    chance.shuffle(free)
    luck = {number: (chance.random(), chance.random()) for number in free}
    counts = [chance.randint(crowd.least, crowd.most) for _ in range(crowd.users)]
    hostile = 1 if attack.one else round(attack.share * crowd.users)
    # Additional votes are taken from the end, so that everybody else votes on the same comparisons.
    asked = [user for user, count in enumerate(counts) for _ in range(count)]
    asked += [user for user in range(hostile) for _ in range((attack.times - 1) * counts[user])]
    said = []
    for number, user in zip(free, asked, strict=False):
        slip = luck[number][0] < attack.flips
        if user >= hostile:
            choice = flipped(preferred(likes[taste], number), slip)
        elif attack.says == "A":
            choice = A
        elif attack.says == "other":
            choice = flipped(preferred(likes[OTHER[taste]], number), slip)
        elif attack.says == "longer":
            choice = preferred(likes["longer"], number)
        else:
            choice = flipped(preferred(likes[taste], number), True)
        said.append((2 * number, 2 * number + 1, choice, user, luck[number][1] < JUDGES))
    return held, to_dataset(said, crowd.users), hostile


def preferred(likes: list[float], comparison: int) -> int:
    a, b = likes[2 * comparison : 2 * comparison + 2]
    return TIE if a == b else A if a > b else B


def flipped(choice: int, slip: bool) -> int:
    return 1 - choice if slip and choice != TIE else choice


def to_dataset(said: list[tuple[int, int, int, int, bool]], users: int) -> Any:
    import torch

    from learner.reward.dataset import Dataset
    from learner.reward.linear_heads import VoteTensors

    a, b, outcome, voters, judges = (torch.tensor(column) for column in zip(*said, strict=True))
    none, ones = torch.zeros(0, dtype=torch.long), torch.ones(len(said))
    votes = VoteTensors(
        a=a, b=b, outcome=outcome, temperature_difference=0 * ones, choice_weight=ones,
        choice_group=torch.arange(len(said)), response=none, thumb=torch.zeros(0), user=none,
        thumb_weight=torch.zeros(0), thumb_group=none, users=users,
    )  # fmt: skip
    names = [f"user{number}" for number in range(users)]
    return Dataset([], votes, [], judges, [], names, voters, ones.bool(), torch.ones(users), ~ones.bool())


def measured(model: Any, features: Any, tested: Any, held: list[int], likes: list[float]) -> dict[str, float]:
    import torch

    scores, questions = model.scores(features), len(likes) // 2 // REPEATS
    comparisons = [number for number in range(len(likes) // 2) if number % questions in set(held)]
    a, b, outcome = tested
    rows = 2 * torch.tensor(comparisons)
    right, _ = accuracy(
        torch.cat([model.scores(a), scores[rows]]),
        torch.cat([model.scores(b), scores[rows + 1]]),
        torch.cat([outcome, torch.tensor([preferred(likes, number) for number in comparisons])]),
    )
    wins = []
    for question in held:
        answers = [2 * (question + repeat * questions) + slot for repeat in range(REPEATS) for slot in (0, 1)]
        # Each answer in turn is the opponent of the best of the four after it.
        for turn in range(len(answers)):
            opponent, *four = [answers[(turn + i) % len(answers)] for i in range(5)]
            best = max(four, key=lambda row: float(scores[row]))
            wins.append((likes[best] > likes[opponent]) + (likes[best] == likes[opponent]) / 2)
    return {"accuracy": right, "best of four": sum(wins) / len(wins)}


if __name__ == "__main__":
    main()
