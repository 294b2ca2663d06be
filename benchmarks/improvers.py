"""Which way to improve the policy: PPO, RLOO and DPO on the same votes, beside best-of-n by the reward model.

    python benchmarks/improvers.py MODEL --work-dir DIR [--hours 8] [--only CELL...] [--write]

A cell is a taste (`clients.demo.voter`), a number of votes, a seed and an arm; a tenth of the votes is flipped. Arms of
one taste, number and seed have the same votes, on the same answers of the reference. `ppo`, `rloo` and `dpo` are
`learner run-once` with that `improver`, all else at its defaults; `best-of-16` fits the same reward model and takes, of
16 answers of the reference, the one that it scores highest: what the votes can teach without training.

Measured on 96 questions that nobody voted on, by the taste itself, a draw is half: the win rate over the reference of
the candidate that the gate chose, or else of the last one, and of the best candidate of the run; with the KL that the
gate measured, the seconds of the stage that trains and the round's greatest resident memory. Each cell is saved in
docs/benchmarks/improvers.json as it ends, so that a killed run resumes; `--write` writes docs/benchmarks/improvers.md
from it. No cell starts after `--hours`. Prints one JSON line last.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from statistics import mean
from typing import Any

from pool import TOKENS, Cell, Pair, make_data, make_pool, shown
from study import DRAW, features_of, measured_round, run_json, unseen_answers, voted

from clients.demo.voter import TASTES

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "improvers.json"
REPORT = RESULTS.with_suffix(".md")
IMPROVERS = ("ppo", "rloo", "dpo")
BEST_OF = 16
ARMS = (*IMPROVERS, f"best-of-{BEST_OF}")
# One about form, one about wording, one about content.
STUDIED = ("short", "gentle", "people")
FLIPS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory or id, or `smollm2`")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work: Path = arguments.work_dir.resolve()
    pairs = make_pool(arguments.model, work, say)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.cell:
        name, arm = arguments.cell
        cell = next(cell for cell in cells() if cell.name == name)
        print(json.dumps(run(work, cell, arm, pairs)))
        return
    end = time.monotonic() + arguments.hours * 3600
    for cell in cells():
        for arm in ARMS:
            key = f"{cell.name}-{arm}"
            if key in results or (arguments.only and key not in arguments.only) or time.monotonic() > end:
                continue
            say(f"{key} begins")
            # A process of its own: memory is that of its children, and an engine goes with it.
            ask = [__file__, arguments.model, "--work-dir", str(work), "--cell", cell.name, arm]
            results[key] = run_json(ask)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            say(f"{key}: {results[key]['win_rate']:.3f}")
    if arguments.write:
        REPORT.write_text(report(results))
    print(json.dumps({"benchmark": "improvers", "results": results}))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cells() -> Iterator[Cell]:
    """Every taste with few votes first, then with many."""
    for seed in range(3):
        for votes in (200, 1000):
            for taste in STUDIED:
                yield Cell(taste, votes, FLIPS, seed)


def run(work: Path, cell: Cell, arm: str, pairs: list[Pair]) -> dict[str, Any]:
    if arm not in IMPROVERS:
        return best_of(work, cell, pairs)
    data = work / "cells" / f"{cell.name}-{arm}"
    make_data(work, data, cell, pairs)
    found = measured_round(work, data, cell, PREFLOOP_IMPROVER=arm)
    rmtree(data)
    rates = {int(step): rate for step, rate in found.get("win_rates", {}).items()}
    if not rates:
        return {"state": found["state"], "sentence": found["sentence"], "win_rate": 0.5, "best": 0.5, "kl": 0.0}
    gate, seconds = found["metrics"].get("gate") or {}, found["metrics"]["seconds"]
    chosen = gate.get("chosen") or {}
    step = chosen.get("step", max(rates))
    return {
        "state": found["state"],
        "sentence": found["sentence"],
        "win_rate": rates.get(step, rates[max(rates)]),
        "best": max(rates.values()),
        "kl": chosen.get("kl", math.nan),
        "seconds": seconds["improve"],
        "round_seconds": sum(seconds.values()),
        "memory_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "reward_model": found.get("accuracy", math.nan),
    }


def best_of(work: Path, cell: Cell, pairs: list[Pair]) -> dict[str, Any]:
    """The win rate of the answer that the cell's reward model likes best of BEST_OF."""
    import torch

    from learner.reward.linear_reward_model import LinearRewardModel

    settings, dataset, features, spec = voted(work, cell, pairs)
    chance = torch.Generator().manual_seed(cell.seed)
    model = LinearRewardModel.fit(features, dataset.train, spec, settings.reward, chance)
    answers = reference_answers(work, pairs)
    taste, won = TASTES[cell.taste], list[float]()
    for prompt, *several in answers:
        rows, _ = features_of(work, [(prompt, one["token_ids"]) for one in several])
        best = several[int(model.scores(rows).argmax())]
        new, old = (taste.score(shown(Told(**one))) for one in (best, several[0]))
        won.append((new > old) + (new == old) / 2)
    rate = mean(won)
    kl = math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF
    return {"state": "", "sentence": "", "win_rate": rate, "best": rate, "kl": kl, "seconds": 0.0}


class Told:
    """A sampled answer, read from a file."""

    def __init__(self, text: str, token_ids: list[int], finish_reason: str) -> None:
        self.text, self.token_ids, self.finish_reason = text, token_ids, finish_reason


def reference_answers(work: Path, pairs: list[Pair]) -> list[list[Any]]:
    """For each unseen question its prompt and BEST_OF answers of the reference; sampled once in a study."""
    kept = work / "best-of.json"
    if kept.exists():
        found: list[list[Any]] = json.loads(kept.read_text())
        return found
    from learner.model.rollout import RolloutEngine
    from learner.process import set_environment
    from learner.settings import LearnerSettings
    from server.shared.model.dtype import resolve_dtype
    from server.store.chats.records import Prompt

    settings = LearnerSettings(data_dir=work / "pool")
    set_environment(settings)
    asked = [one[0] for one, _ in unseen_answers(work, [pair for pair in pairs if not pair.seen])]
    longest = max(map(len, asked)) + TOKENS + 1
    reference = work / "pool" / "policies" / "v0000"
    engine = RolloutEngine(reference, settings, resolve_dtype(settings.dtype).name, longest)
    samples = engine.sample([Prompt("", prompt, TOKENS) for prompt in asked for _ in range(BEST_OF)], DRAW)
    told = [
        {"text": one.text, "token_ids": one.token_ids, "finish_reason": "stop" if one.ended else "length"}
        for one in samples
    ]
    found = [[prompt, *told[n * BEST_OF : (n + 1) * BEST_OF]] for n, prompt in enumerate(asked)]
    kept.write_text(json.dumps(found))
    return found


def report(results: dict[str, Any]) -> str:
    lines = [
        "# Which way to improve the policy",
        "",
        "`benchmarks/improvers.py`: the same votes on the same answers, a tenth flipped; 96 questions that nobody",
        "voted on, the win rate over the reference by the taste itself. Chosen: the candidate that the gate chose, or",
        "else the last; best: the best of the run. Means of the seeds that were run.",
        "",
        "| votes | taste | arm | seeds | promoted | chosen | best | KL, nats | training, s | memory, GiB |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for votes in (200, 1000):
        for taste in (*STUDIED, "all"):
            for arm in ARMS:
                ran = [
                    results[f"{cell.name}-{arm}"]
                    for cell in cells()
                    if cell.votes == votes and taste in (cell.taste, "all") and f"{cell.name}-{arm}" in results
                ]
                if ran:
                    lines.append(f"| {votes} | {taste} | {arm} | {len(ran)} | {figures(ran)} |")
    return "\n".join(lines) + "\n"


def figures(ran: list[dict[str, Any]]) -> str:
    def over(name: str, digits: int) -> str:
        known = [one[name] for one in ran if not math.isnan(one.get(name) or math.nan)]
        return f"{mean(known):.{digits}f}" if known else ""

    promoted = sum(one["state"] == "promoted" for one in ran) if ran[0]["state"] else ""
    parts = [promoted, over("win_rate", 3), over("best", 3), over("kl", 1), over("seconds", 0), over("memory_gib", 1)]
    return " | ".join(map(str, parts))


if __name__ == "__main__":
    main()
