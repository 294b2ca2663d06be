"""How often meaningless votes promote a candidate that a round really trained.

    python benchmarks/null_gate.py DATA_DIR... [--shuffles 20] [--write]

Each data directory is one in which a round has ended that kept its candidates (`benchmarks/rounds.py`, under its
--work-dir). The outcomes of the round's judge votes are assigned to its comparisons at random, and the gate judges the
candidates again, as in a round; the signal test, which would have ended it, is off. Alone, the gate promotes or
refuses; where people decide, ten of them choose at random about a candidate that waits, up to ten choices each. All
answers are sampled once. `--write` writes docs/benchmarks/null_gate.md. Prints one JSON line last.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from clients.interval import wilson
from learner.round.review.canary import EARLY
from server.store.e_value import CanaryResult, chance_of

REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "null_gate.md"
VOTERS, CHOICES_EACH = 10, 10
EVIDENCE = 20.0
COLUMNS = ("judge_votes", "shuffles", "alone", "waits", "by_people")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--shuffles", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for data in arguments.data:
        results[data.name] = shuffled_gates(data.resolve(), arguments.shuffles)
        print(f"{data.name}: {json.dumps(results[data.name])}", file=sys.stderr, flush=True)
    if arguments.write:
        REPORT.write_text("\n".join(page(results)) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "null_gate", "results": results}))


def shuffled_gates(data: Path, shuffles: int) -> dict[str, Any]:
    """What becomes of the candidates of the directory's last round, for each shuffle of its judge votes."""
    from rich.console import Console

    from learner.process import set_environment
    from learner.progress import Stages
    from learner.round.resume import began_with
    from server.store.learning.records import Lease
    from server.store.store import Store

    store = Store.open(data)
    [round_] = store.rounds.page(limit=1)
    settings = began_with(round_, {"data_dir": data})
    set_environment(settings)

    from learner.round.alignment.stages import fit_reward_model
    from learner.round.alignment.votes_stage import extract_features, load_feedback
    from learner.round.workspace import Workspace

    # No stage before the gate's is done again, so nothing is written.
    snapshot = store.snapshots.take(round_.watermark, settings.max_votes, round_.quarantined)
    work = Workspace(store, Lease("learner", "benchmark", 0), settings, Stages(Console(stderr=True)), round_, snapshot)
    dataset = load_feedback(work)
    features = extract_features(work, dataset)
    reward_model = fit_reward_model(work, dataset, features, None)
    remember_answers()
    try:
        found = [one_shuffle(work, dataset, features, reward_model, number) for number in range(shuffles)]
    finally:
        work.close()
        store.close()
    return {
        "first": round_.incumbent_version == round_.reference_version,
        "judge_votes": len(dataset.judge),
        "shuffles": shuffles,
        **{name: sum(one[name] for one in found) for name in ("alone", "waits", "by_people")},
    }


def remember_answers() -> None:
    """Lets every shuffle judge the same answers: each version's are sampled once for each draw."""
    from learner.round.gate import gate_stage

    for name in ("published_answers", "candidate_answers"):
        setattr(gate_stage, name, remembered(getattr(gate_stage, name)))


def remembered(sample: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[tuple[Any, int], Any] = {}

    def look_up(work: Any, which: Any, prompts: Any, seed: int, reward_model: Any) -> Any:
        if (which, seed) not in known:
            known[which, seed] = sample(work, which, prompts, seed, reward_model)
        return known[which, seed]

    return look_up


def one_shuffle(work: Any, dataset: Any, features: Any, reward_model: Any, number: int) -> dict[str, bool]:
    """Whether the gate alone promotes, whether a candidate waits where people can decide, and whether it is promoted
    then, by it or by people."""
    import torch

    from learner.gate.win_rate import fit_judge
    from learner.round.gate.gate_stage import Bench, choose_and_confirm, opponents, promising

    settings, votes = work.settings, dataset.judge
    order = torch.randperm(len(votes.outcome), generator=torch.Generator().manual_seed(number))
    shuffled = replace(votes, outcome=votes.outcome[order])
    judge = fit_judge(
        features, shuffled, reward_model.standardiser, reward_model.l2, settings.reward.label_smoothing,
        settings.gate.refits, work.generator(3),
    )  # fmt: skip
    bench = Bench(work, judge, reward_model, opponents(work))
    steps = promising(work.round.metrics.improvement, settings.gate)
    alone, with_people = (choose_and_confirm(bench, steps, canary=canary)[0] for canary in (False, True))
    chance = random.Random(f"{work.round.id} {number}")
    by_people = with_people.promoted and (not with_people.canary or coins_promote(chance))
    return {"alone": alone.promoted, "waits": with_people.canary, "by_people": by_people}


def coins_promote(chance: random.Random) -> bool:
    """Whether ten people who choose at random promote a canary, by evidence on the way or by all choices at the end."""
    means: list[float] = []
    for _ in range(VOTERS * CHOICES_EACH):
        means.append(chance.choice([0.0, 1.0]))
        result = CanaryResult(tuple(means), len(means))
        if max(result.better, result.worse) >= EVIDENCE / EARLY:
            return result.better >= EVIDENCE / EARLY
    return chance_of(means) <= (1 - EARLY) / EVIDENCE


def page(results: dict[str, Any]) -> Iterator[str]:
    """Its lines."""
    yield "# The gate on meaningless votes"
    yield ""
    yield "`python benchmarks/null_gate.py --write`: the program's docstring says what is done."
    yield ""
    yield "| round | judge votes | shuffles | promoted by the gate alone | waited for people | promoted in the end |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, one in results.items():
        told = f"{name}, {'first' if one['first'] else 'later'}"
        yield f"| {told} | {' | '.join(str(one[key]) for key in COLUMNS)} |"
    total = {key: sum(one[key] for one in results.values()) for key in COLUMNS[1:]}
    yield f"| all | | {' | '.join(map(str, total.values()))} |"
    yield ""
    for key, words in (("alone", "by the gate alone"), ("by_people", "by the gate and people")):
        low, high = wilson(total[key], total["shuffles"])
        yield f"Promoted {words}: {total[key]} of {total['shuffles']}, 95 % interval {low:.3f} to {high:.3f}."


if __name__ == "__main__":
    main()
