"""Whether imported preferences help the first votes: PandaLM's annotators, for a service whose people have 40 votes.

    python benchmarks/imports.py MODEL pandalm_testset_v1.json --work-dir DIR [--write]

The data are 999 pairs of answers to 170 instructions (github.com/WeOpenML/PandaLM, Apache-2.0), not part of this
repository; the majority of a pair's three annotators is an imported preference. Two kinds of people vote:
- the annotators themselves: pairs of half of the instructions are imported, drawn anew for each seed; votes are on
  pairs of a quarter, and those of the last quarter are predicted.
- simulated voters with a taste (`clients.demo.voter`), on sixteen answers of the default model to each question, a
  tenth of their votes flipped (`benchmarks/active_pairs.py`). All of PandaLM is imported; pairs of answers to unseen
  questions are predicted.
The reward model is fitted without the import, with it as a round does, with it however little it helps to predict the
votes, and with the preferences added to the votes. Prints one JSON line last; `--write` writes
docs/benchmarks/imports.md.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import active_pairs
from pandalm import features_of, group, said, votes_of
from planner import to_votes
from pool import CHOICES

from clients.demo.voter import FLIPPED, TASTES

REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "imports.md"
VOTES, SEEDS = (40,), 5
# Folds of the cross-validations: less than a round has, to take minutes.
REPEATS = 1
ARMS = ("without", "as a round does", "without a margin", "as votes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory, as in a data directory's policies/v0000")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    rows = json.loads(arguments.data.read_text())
    pool = active_pairs.make_pool(arguments.model, work)
    features, spec = features_of(rows, arguments.model, work)
    results: dict[str, list[Any]] = {}
    for seed in range(SEEDS):
        for votes in VOTES:
            results.setdefault(f"annotators {votes}", []).append(of_annotators(rows, features, spec, votes, seed))
            for taste in TASTES:
                found = of_taste(pool, imported(rows, features, range(len(rows))), taste, votes, seed)
                results.setdefault(f"{taste} {votes}", []).append(found)
        print(f"seed {seed + 1} of {SEEDS}", file=sys.stderr, flush=True)
    if arguments.write:
        REPORT.write_text("\n".join(page(results)) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "imports", "results": results}))


def imported(rows: list[dict[str, Any]], features: Any, numbers: Any) -> Any:
    """The pairs with these numbers that a majority decided."""
    from learner.reward.prior import ImportedPreferences

    pairs = [(2 * n, 2 * n + 1) if said(rows[n]) == 1 else (2 * n + 1, 2 * n) for n in numbers if said(rows[n])]
    return ImportedPreferences(features[[row for pair in pairs for row in pair]])


def of_annotators(rows: list[dict[str, Any]], features: Any, spec: Any, votes: int, seed: int) -> dict[str, Any]:
    """Accuracy of each arm on the last quarter of the instructions."""
    import torch

    groups = group(rows)
    part = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(seed))[groups] % 4
    known = [n for n in range(len(rows)) if part[n] < 2]
    mine = random.Random(seed).sample([n for n in range(len(rows)) if part[n] == 2], votes)
    # One annotator of each pair votes.
    every = votes_of(rows, groups, torch.isin(torch.arange(len(rows)), torch.tensor(mine)))
    first = torch.arange(0, len(every.a), 3)
    chosen = replace(every.at(first, torch.zeros(0, dtype=torch.long)), choice_weight=torch.ones(len(first)))
    tested = [n for n in range(len(rows)) if part[n] == 3 and said(rows[n])]

    def accuracy(model: Any) -> float:
        scores = model.scores(features)
        right = [float((scores[2 * n] > scores[2 * n + 1]) == (said(rows[n]) == 1)) for n in tested]
        return mean(right)

    given = imported(rows, features, known)
    return {arm: measured(arm, features, chosen, spec, given, seed, accuracy) for arm in ARMS}


def of_taste(pool: Any, given: Any, taste: str, votes: int, seed: int) -> dict[str, Any]:
    """Accuracy of each arm on pairs of answers to unseen questions."""
    chance = random.Random(f"{taste} {seed}")
    cast: list[tuple[int, int, str, float]] = []
    for question in chance.sample(range(active_pairs.UNSEEN, active_pairs.UNSEEN + active_pairs.SEEN), votes):
        one, other = chance.sample(pool.of(question), 2)
        choice = TASTES[taste].choice(pool.answers[one], pool.answers[other])
        flipped = chance.random() < active_pairs.FLIPS
        cast.append((one, other, CHOICES[FLIPPED[choice] if flipped else choice], 0.0))
    chosen = to_votes(cast)

    def accuracy(model: Any) -> float:
        return active_pairs.measure(model, pool, taste)[0]

    return {arm: measured(arm, pool.features, chosen, pool.spec, given, seed, accuracy) for arm in ARMS}


def measured(arm: str, features: Any, votes: Any, spec: Any, given: Any, seed: int, accuracy: Any) -> list[float]:
    """The accuracy of an arm's reward model, and the weight that it gave to the import."""
    import torch

    import learner.reward.linear_reward_model as fitting
    from learner.settings import RewardSettings

    margin = fitting.BETTER
    read = None if arm in ("without", "as votes") else given
    if arm == "as votes":
        features, votes = with_votes(features, votes, given)
    try:
        fitting.BETTER = 0.0 if arm == "without a margin" else margin
        generator = torch.Generator().manual_seed(seed)
        model = fitting.LinearRewardModel.fit(
            features, votes, spec, RewardSettings(fold_repeats=REPEATS), generator, read
        )
    finally:
        fitting.BETTER = margin
    return [round(accuracy(model), 4), model.prior_weight]


def with_votes(features: Any, votes: Any, given: Any) -> Any:
    """The preferences as votes beside the others, each of weight 1."""
    import torch

    more, rows, groups = given.votes, len(features), votes.groups
    joined = replace(
        votes,
        a=torch.cat([votes.a, more.a + rows]),
        b=torch.cat([votes.b, more.b + rows]),
        outcome=torch.cat([votes.outcome, more.outcome]),
        temperature_difference=torch.cat([votes.temperature_difference, more.temperature_difference]),
        choice_weight=torch.cat([votes.choice_weight, more.choice_weight]),
        choice_group=torch.cat([votes.choice_group, more.choice_group + groups]),
    )
    return torch.cat([features, given.features]), joined


# The page


def page(results: dict[str, list[Any]]) -> Iterator[str]:
    """Its lines."""
    yield "# Imported preferences at the first votes"
    yield ""
    yield "`python benchmarks/imports.py --write`: the program's docstring says who votes, what is imported, and what"
    yield f"the columns are. Accuracy on unseen pairs, means of {SEEDS} seeds; in brackets the 95 % interval of the"
    yield "difference to the reward model without the import, and in how many fits the import was used."
    yield ""
    yield f"| votes of | votes | {' | '.join(ARMS)} |"
    yield f"|---|---:|{'---:|' * len(ARMS)}"
    for name, runs in results.items():
        who, votes = name.rsplit(" ", 1)
        cells = [f"{mean(run['without'][0] for run in runs):.3f}", *(cell(runs, arm) for arm in ARMS[1:])]
        yield f"| {who} | {votes} | {' | '.join(cells)} |"


def cell(runs: list[Any], arm: str) -> str:
    gains = [run[arm][0] - run["without"][0] for run in runs]
    error = 1.96 * stdev(gains) / len(gains) ** 0.5
    used = sum(run[arm][1] > 0 for run in runs)
    how_often = "" if arm == "as votes" else f", {used} of {len(runs)}"
    return (
        f"{mean(run[arm][0] for run in runs):.3f} [{mean(gains) - error:+.3f}, {mean(gains) + error:+.3f}{how_often}]"
    )


if __name__ == "__main__":
    main()
