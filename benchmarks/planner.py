"""How many votes a planner saves by choosing which answers to compare, against random pairs, in simulation.

    python benchmarks/planner.py MODEL --work-dir DIR [--write]

Uses the pool of `benchmarks/study.py` (the same --work-dir): six answers to each question, three at each of Compare's
temperatures. Questions come in random order, as from users; for each, two answers of different temperature are shown
and voted on by a taste, with a tenth of the votes flipped. The strategies for choosing the two:
- random: any.
- second: any one, and of the three others the one on which the reward model's members disagree most about which is
  better (the variance of their probabilities). This is what a server with a `scoring_address` does.
- second, information: the same, by the expected information of a vote (BALD, Houlsby et al. 2011).
- second, close: the same, by how close the two scores are, which needs no members.
- pair: of all nine pairs the one on which the members disagree most.
The model is refitted every 20 votes and measured by its accuracy against the taste on comparisons of unseen questions.
Each run is saved as it ends, so that a killed benchmark resumes after the last one. Prints one JSON line last;
`--write` writes docs/benchmarks/planner.md.
"""

import argparse
import itertools
import json
import random
import sys
from collections import defaultdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from kept import kept
from pool import CHOICES, REPEATS, Pair, make_pool
from study import accuracy, features_of, unseen

from clients.demo.voter import FLIPPED, TASTES, Answer

VOTES, BATCH, SEEDS, FLIPS = 300, 20, 8, 0.1
STRATEGIES = ("random", "second", "second, information", "second, close", "pair")
RESAMPLES = 2000
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "planner.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    pairs = make_pool(arguments.model, work, lambda line: print(line, file=sys.stderr))
    questions, features, spec = answers_by_question(work, pairs)
    tested = {taste: unseen(work, pairs, taste) for taste in TASTES}
    curves: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for taste, seed, strategy in itertools.product(TASTES, range(SEEDS), STRATEGIES):
        path = work / "results" / f"planner-{VOTES}-{BATCH}-{FLIPS}" / f"{taste}-{seed}-{strategy}.json"
        run = partial(learn, questions, features, spec, tested[taste], taste, seed, strategy)
        curves[taste][strategy].append(kept(path, run))
    if arguments.write:
        REPORT.write_text(page(curves), encoding="utf-8")
    print(json.dumps({"benchmark": "planner", "curves": curves}))


def answers_by_question(work: Path, pairs: list[Pair]) -> Any:
    """([(Answer, row of features, temperature), ...] for each question, features (N, F), spec)."""
    from server.store.store import Store

    seen = [pair for pair in pairs if pair.seen]
    store = Store.open(work / "pool")
    stored = [store.responses.comparison(pair.user, pair.comparison_id) for pair in seen]
    store.close()
    tokens = [(one.prompt_token_ids, one.token_ids) for c in stored for one in (c.a, c.b)]
    features, spec = features_of(work, tokens)
    questions: list[list[tuple[Answer, int, float]]] = [[] for _ in range(len(seen) // REPEATS)]
    for number, (pair, c) in enumerate(zip(seen, stored, strict=True)):
        one = questions[number % len(questions)]
        one += [(pair.a, 2 * number, c.a.temperature), (pair.b, 2 * number + 1, c.b.temperature)]
    return questions, features, spec


def learn(questions: Any, features: Any, spec: Any, tested: Any, taste: str, seed: int, strategy: str) -> list[float]:
    """Accuracy after every batch of votes."""
    import torch

    from learner.reward.linear_reward_model import LinearRewardModel
    from learner.settings import RewardSettings

    chance = random.Random(f"{taste} {seed}")
    order = chance.sample(range(len(questions)), VOTES)
    a, b, outcome = tested
    votes: list[tuple[int, int, str, float]] = []
    model, accuracies = None, []
    for number, question in enumerate(order, start=1):
        firsts, others = by_temperature(questions[question], chance)
        if model is None or strategy == "random":
            one, other = firsts[0], others[0]
        else:
            ones = firsts if strategy == "pair" else firsts[:1]
            one, other = most_disputed(ones, others, model, features, strategy)
        choice = TASTES[taste].choice(one[0], other[0])
        said = CHOICES[FLIPPED[choice] if chance.random() < FLIPS else choice]
        votes.append((one[1], other[1], said, one[2] - other[2]))
        if number % BATCH == 0:
            generator = torch.Generator().manual_seed(seed)
            model = LinearRewardModel.fit(features, to_votes(votes), spec, RewardSettings(fold_repeats=2), generator)
            accuracies.append(round(accuracy(model.scores(a), model.scores(b), outcome)[0], 4))
    return accuracies


def by_temperature(answers: Any, chance: random.Random) -> tuple[Any, Any]:
    """The answers at one temperature and those at the other, in random order."""
    first, other = chance.sample(sorted({temperature for *_, temperature in answers}), 2)
    mixed = chance.sample(answers, len(answers))
    return [one for one in mixed if one[2] == first], [one for one in mixed if one[2] == other]


def most_disputed(ones: Any, others: Any, model: Any, features: Any, strategy: str) -> tuple[Any, Any]:
    """The pair of one of `ones` and one of `others` on which a vote would be most informative."""
    import torch

    rows = [row for _, row, _ in [*ones, *others]]
    first, second = model.member_scores(features[rows]).split([len(ones), len(others)], dim=1)
    won = torch.sigmoid(first[:, :, None] - second[:, None, :])
    if strategy == "second, close":
        first, second = model.scores(features[rows]).split([len(ones), len(others)])
        worth = -(first[:, None] - second[None, :]).abs()
    elif strategy == "second, information":
        worth = entropy(won.mean(dim=0)) - entropy(won).mean(dim=0)
    else:
        worth = won.var(dim=0)
    one, other = divmod(int(worth.argmax()), len(others))
    return ones[one], others[other]


def entropy(p: Any) -> Any:
    """The entropy in nats of a coin with probability p."""
    import torch

    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def to_votes(votes: list[tuple[int, int, str, float]]) -> Any:
    import torch

    from learner.reward.dataset import OUTCOMES
    from learner.reward.linear_heads import VoteTensors

    none = torch.zeros(0, dtype=torch.long)
    rows_a, rows_b, said, difference = zip(*votes, strict=True)
    return VoteTensors(
        a=torch.tensor(rows_a), b=torch.tensor(rows_b), outcome=torch.tensor([OUTCOMES[one] for one in said]),
        temperature_difference=torch.tensor(difference), choice_weight=torch.ones(len(votes)),
        choice_group=torch.arange(len(votes)), response=none, thumb=torch.zeros(0), user=none,
        thumb_weight=torch.zeros(0), thumb_group=none, users=1,
    )  # fmt: skip


def gain(random_runs: list[list[float]], planned_runs: list[list[float]]) -> tuple[float, float, float]:
    """Mean gain in accuracy over random pairs after the first `BATCH` votes, which are the same, with its 95 % interval
    over pairs of runs with the same taste and seed."""
    chance = random.Random(0)
    gains = [mean(planned[1:]) - mean(one[1:]) for one, planned in zip(random_runs, planned_runs, strict=True)]
    means = sorted(mean(chance.choices(gains, k=len(gains))) for _ in range(RESAMPLES))
    return mean(gains), means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def needed(planned_runs: list[list[float]], level: float) -> str:
    """The number of votes after which the planned runs reach `level`, by averages of three measurements."""
    curve = smooth(planned_runs)
    return next((str((number + 2) * BATCH) for number, value in enumerate(curve) if value >= level), "never")


def smooth(runs: list[list[float]]) -> list[float]:
    """Entry i is the mean after i + 1, i + 2 and i + 3 batches."""
    means = [mean(column) for column in zip(*runs, strict=True)]
    return [mean(means[i : i + 3]) for i in range(len(means) - 2)]


def page(curves: Any) -> str:
    lines = [
        "# Choosing which answers to compare",
        "",
        f"`python benchmarks/planner.py --write`, {datetime.now(UTC):%Y-%m-%d}. Accuracy against the taste on",
        f"comparisons of unseen questions, means of {SEEDS} seeds, a tenth of the votes flipped. Six answers to each",
        "question, three at each temperature; the program's docstring describes the strategies.",
        "",
    ]
    at = [2, 4, 7, 10, 14]
    lines.append("| taste | pairs | " + " | ".join(f"{(i + 1) * BATCH} votes" for i in at) + " |")
    lines.append("|---|---|" + "---:|" * len(at))
    every = {strategy: [run for taste in curves.values() for run in taste[strategy]] for strategy in STRATEGIES}
    for taste, by_strategy in [*curves.items(), ("mean", every)]:
        for strategy, runs in by_strategy.items():
            means = [mean(column) for column in zip(*runs, strict=True)]
            lines.append(f"| {taste} | {strategy} | " + " | ".join(f"{means[i]:.3f}" for i in at) + " |")
    levels = [100, 180, 260]
    lines += [
        "",
        "Points of accuracy above the random pairs (mean over all measurements, 95 % interval over tastes and seeds),",
        "and the votes needed to match the random pairs after 100, 180 and 260 votes:",
        "",
    ]
    lines.append("| pairs | gain | " + " | ".join(str(votes) for votes in levels) + " |")
    lines.append("|---|---:|" + "---:|" * len(levels))
    for strategy in STRATEGIES[1:]:
        points, low, high = (100 * one for one in gain(every["random"], every[strategy]))
        votes = [needed(every[strategy], smooth(every["random"])[level // BATCH - 2]) for level in levels]
        lines.append(f"| {strategy} | {points:+.1f} [{low:+.1f}, {high:+.1f}] | " + " | ".join(votes) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
