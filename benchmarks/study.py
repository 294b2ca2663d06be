"""Whether the learner learns what voters like: simulated voters, whole rounds, unseen questions.

    python benchmarks/study.py MODEL --work-dir DIR [--hours 8] [--write]

A taste is a rule on an answer's text (`clients.demo.voter`); votes follow it except for a share of flipped ones. A cell
is a taste, a number of votes, a share of flips and a seed (`benchmarks/pool.py`). There are four kinds of experiment;
each result is saved as it is computed, so that a killed study resumes after the last one:
- rewards: the reward model alone, in every combination: its accuracy against the taste without flips on comparisons of
  unseen questions, compared with "the longer answer wins".
- rounds: `learner run-once` as an operator runs it, most informative cells first. Every candidate it kept answers
  unseen questions; the win rate over the reference's answers is judged by the taste itself.
- starts: half of the votes, a round, the other half, and a second round that starts from the reference again or from
  the active policy (`start_from`).
- shuffles: votes assigned to comparisons at random. The signal test sees each set; those that pass go through a whole
  round. Nothing should be promoted.

No experiment starts after `--hours`. `--write` writes docs/benchmarks/study.md and its picture from the saved results.
Prints one JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

from kept import kept
from pool import TOKENS, Cell, Pair, cast_rest, make_data, make_pool, shown

from clients.demo.voter import TASTES

ROUND_SECONDS = 3600
SHUFFLES = 60
SHUFFLED = (Cell("short", 200, 0.1, 0), Cell("to-you", 200, 0.1, 0))
DRAW = 424_242


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory or id, or `smollm2`")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=["rewards", "rounds", "starts", "shuffles"])
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--taste", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work: Path = arguments.work_dir.resolve()
    pairs = make_pool(arguments.model, work, say)
    if arguments.evaluate:
        print(json.dumps(evaluate(arguments.evaluate, pairs, work, arguments.taste)))
        return
    end = time.monotonic() + arguments.hours * 3600
    kinds: dict[str, tuple[list[Cell], Callable[[Path, Cell, list[Pair]], dict[str, Any]]]] = {
        "rewards": (reward_cells(), fit_rewards),
        "rounds": (round_cells(), run_cell),
        "starts": (start_cells(), run_starts),
        "shuffles": (shuffle_cells(), run_shuffle),
    }
    results: dict[str, dict[str, Any]] = {}
    for kind, (cells, run) in kinds.items():
        results[kind] = {}
        for cell in cells:
            path = work / "results" / kind / f"{cell.name}.json"
            if path.exists() or (arguments.only in (None, kind) and time.monotonic() < end):
                results[kind][cell.name] = kept(path, partial(with_cell, run, work, cell, pairs))
    if arguments.write:
        from study_report import write_report

        write_report(results)
    print(json.dumps({"benchmark": "study", "results": results}))


def with_cell(run: Callable[..., dict[str, Any]], work: Path, cell: Cell, pairs: list[Pair]) -> dict[str, Any]:
    return {"cell": asdict(cell), **run(work, cell, pairs)}


def reward_cells() -> list[Cell]:
    return [
        Cell(taste, votes, flips, seed)
        for votes in (50, 200, 1000)
        for flips in (0.1, 0.25)
        for seed in range(3)
        for taste in TASTES
    ]


def round_cells() -> list[Cell]:
    """Every taste at the votes and flips of the stated aims, then more votes, seeds and flips, and fewer votes."""
    order = [(200, 0.1, 0), (1000, 0.1, 0), (200, 0.1, 1), (200, 0.25, 0), (50, 0.1, 0), (200, 0.1, 2)]
    order += [(1000, 0.1, 1), (1000, 0.25, 0), (50, 0.25, 0), (1000, 0.1, 2), (50, 0.1, 1), (50, 0.1, 2)]
    return [Cell(taste, *rest) for rest in order for taste in TASTES]


def start_cells() -> list[Cell]:
    return [Cell(taste, 400, 0.1, seed) for seed in range(3) for taste in TASTES]


def shuffle_cells() -> list[Cell]:
    return [replace(cell, shuffle=number) for cell in SHUFFLED for number in range(1, SHUFFLES + 1)]


# Rewards


def fit_rewards(work: Path, cell: Cell, pairs: list[Pair]) -> dict[str, Any]:
    """Fits a round's reward model to these votes, with a round's train and judge split, penalty and folds."""
    import torch

    from learner.reward.linear_reward_model import LinearRewardModel

    settings, dataset, features, spec = voted(work, cell, pairs)
    model = LinearRewardModel.fit(
        features, dataset.train, spec, settings.reward, torch.Generator().manual_seed(cell.seed)
    )
    a, b, outcome = unseen(work, pairs, cell.taste)
    right, tested_on = accuracy(model.scores(a), model.scores(b), outcome)
    return {
        "accuracy": right,
        "longer_wins": accuracy(a[:, -1], b[:, -1], outcome)[0],
        "tested_on": tested_on,
        "trained_on": len(dataset.train),
        "ties": float((dataset.votes.outcome == 2).float().mean()),
        "l2": model.l2,
    }


def voted(work: Path, cell: Cell, pairs: list[Pair]) -> Any:
    """(settings, dataset, features, spec) for the cell's votes, as in a round."""
    from learner.reward.dataset import to_dataset
    from learner.settings import LearnerSettings
    from server.store.store import Store

    data = work / "cell"
    make_data(work, data, cell, pairs)
    settings = LearnerSettings(data_dir=data, seed=cell.seed)
    store = Store.open(data)
    dataset = to_dataset(
        store.snapshots.take(), time.time(), settings.gate.judge_share, settings.reward, lambda text, ended: [0]
    )
    store.close()
    rmtree(data)
    features, spec = features_of(work, dataset.answers)
    return settings, dataset, features, spec


def features_of(work: Path, answers: list[tuple[list[int], list[int]]]) -> Any:
    """(features, spec); each answer's features are computed once in the whole study."""
    from transformers import AutoModelForCausalLM

    from learner.model.features import FeatureCache, feature_spec
    from server.shared.model.dtype import MICRO_BATCH_TOKENS, resolve_dtype, torch_dtype
    from server.shared.model.text import ChatText

    dtype = resolve_dtype("auto").name
    reference = work / "pool" / "policies" / "v0000"
    if not hasattr(features_of, "model"):
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch_dtype(dtype))
        features_of.model = model, feature_spec(model, ChatText.load(reference))  # type: ignore[attr-defined]
    model, spec = features_of.model  # type: ignore[attr-defined]
    cache = FeatureCache.open(work / "features", "study", spec, dtype)
    try:
        return cache.get(answers, model, spec, MICRO_BATCH_TOKENS[dtype], lambda n: None), spec
    finally:
        cache.close()


def accuracy(scores_a: Any, scores_b: Any, outcome: Any) -> tuple[float, int]:
    """The share of comparisons with a winner in which the scores name it, and the number of those comparisons."""
    from learner.reward.evaluation import agreement

    right = agreement(scores_a - scores_b, outcome)
    decisive = ~right.isnan()
    return float(right[decisive].mean()), int(decisive.sum())


def unseen(work: Path, pairs: list[Pair], taste: str) -> Any:
    """(features of a, features of b, outcome by the taste) for the comparisons without votes."""
    import torch
    from pool import CHOICES

    from learner.reward.dataset import OUTCOMES

    tested = [pair for pair in pairs if not pair.seen]
    answers = unseen_answers(work, tested)
    a, _ = features_of(work, [one for one, _ in answers])
    b, _ = features_of(work, [other for _, other in answers])
    outcome = [OUTCOMES[CHOICES[TASTES[taste].choice(pair.a, pair.b)]] for pair in tested]
    return a, b, torch.tensor(outcome)


def unseen_answers(work: Path, tested: list[Pair]) -> list[Any]:
    from server.store.store import Store

    store = Store.open(work / "pool")
    try:
        found = [store.responses.comparison(pair.user, pair.comparison_id) for pair in tested]
    finally:
        store.close()
    return [((c.a.prompt_token_ids, c.a.token_ids), (c.b.prompt_token_ids, c.b.token_ids)) for c in found]


# Rounds


def run_cell(work: Path, cell: Cell, pairs: list[Pair]) -> dict[str, Any]:
    """Runs one round as an operator would, and evaluates it on unseen questions."""
    data = work / "cells" / cell.name
    make_data(work, data, cell, pairs)
    result = measured_round(work, data, cell)
    rmtree(data)
    return result


def run_starts(work: Path, cell: Cell, pairs: list[Pair]) -> dict[str, Any]:
    """Runs a second round on twice the votes from each start, if the first round was promoted."""
    data = work / "cells" / f"{cell.name}-first"
    make_data(work, data, cell, pairs, cast=cell.votes // 2)
    first = measured_round(work, data, cell)
    found: dict[str, Any] = {"first": first, "state": first["state"]}
    if first["state"] == "promoted":
        cast_rest(data, cell, pairs, cell.votes // 2)
        for start in ("reference", "active"):
            second = work / "cells" / f"{cell.name}-{start}"
            rmtree(second, ignore_errors=True)
            copytree(data, second)
            found[start] = measured_round(work, second, cell, PREFLOOP_POLICY__START_FROM=start)
            rmtree(second)
    rmtree(data)
    return found


def measured_round(work: Path, data: Path, cell: Cell, **settings: str) -> dict[str, Any]:
    """Runs one round in `data` and evaluates its candidates by the taste."""
    report = run_round(data, cell.seed, **settings)
    metrics = report["metrics"]
    return {
        "state": report["state"],
        "sentence": report["sentence"],
        "minutes": round(sum(metrics["seconds"].values()) / 60, 2),
        "metrics": {name: value for name, value in metrics.items() if name != "versions"},
        **process([str(work / "pool"), "--work-dir", str(work), "--evaluate", str(data), "--taste", cell.taste]),
    }


def run_round(data: Path, seed: int, **settings: str) -> dict[str, Any]:
    """Runs `learner run-once`; returns its report."""
    command = ["-m", "learner.cli", "run-once", "--data-dir", str(data), "--seed", str(seed), "--json"]
    alone = {"PREFLOOP_GATE__CANARY": "off", "PREFLOOP_REVIEW__ACTIVE_PAIRS": "0"}
    return run_json(command, PREFLOOP_GATE__KEEP_CANDIDATES="true", **alone, **settings)


def process(arguments: list[str]) -> dict[str, Any]:
    """Runs this program in a separate process, which owns an engine."""
    return run_json([__file__, *arguments])


def run_json(arguments: list[str], **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, text=True, check=False,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=ROUND_SECONDS,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def evaluate(data: Path, pairs: list[Pair], work: Path, taste: str) -> dict[str, Any]:
    """Evaluates the newest reward model on unseen comparisons, and each candidate of the newest round against the
    reference on unseen questions: one answer each with the same seeds; ties count as half a win."""
    from learner.process import set_environment
    from learner.settings import LearnerSettings
    from server.shared.model.dtype import resolve_dtype, torch_dtype

    settings = LearnerSettings(data_dir=data)
    set_environment(settings)
    dtype = resolve_dtype(settings.dtype).name

    from learner.model.policy import published_weights
    from learner.model.rollout import RolloutEngine
    from learner.reward.linear_reward_model import LinearRewardModel
    from server.store.chats.records import Prompt

    found: dict[str, Any] = {}
    if fitted := sorted(data.glob("reward_models/rm*")):
        model = LinearRewardModel.load(fitted[-1])
        a, b, outcome = unseen(work, pairs, taste)
        found["accuracy"], _ = accuracy(model.scores(a), model.scores(b), outcome)
    rounds = sorted(data.glob("rounds/*"), key=lambda directory: directory.stat().st_mtime)
    candidates = sorted(rounds[-1].glob("step-*")) if rounds else []
    if not candidates:
        return found
    reference = data / "policies" / "v0000"
    asked = unseen_answers(work, [pair for pair in pairs if not pair.seen])
    prompts = [Prompt("", one[0], TOKENS) for one, _ in asked]
    engine = RolloutEngine(reference, settings, dtype, max(len(prompt.token_ids) for prompt in prompts) + TOKENS + 1)

    def scores(directory: Path, base: Path | None) -> list[float]:
        engine.push(published_weights(directory, base, torch_dtype(dtype)))
        samples = engine.sample(prompts, DRAW)
        return [TASTES[taste].score(shown(sample)) for sample in samples]

    before = scores(reference, None)
    rates = {}
    for directory in candidates:
        after = scores(directory, reference)
        wins = sum((new > old) + (new == old) / 2 for new, old in zip(after, before, strict=True))
        rates[directory.name.removeprefix("step-").lstrip("0")] = wins / len(before)
    return {**found, "win_rates": rates, "questions": len(before)}


# Shuffles


def run_shuffle(work: Path, cell: Cell, pairs: list[Pair]) -> dict[str, Any]:
    """Runs a round's signal test on uninformative votes, and a whole round if it passes."""

    from learner.reward.sign_flips import signal_test

    settings, dataset, features, spec = voted(work, cell, pairs)
    votes, conversations = dataset.shown
    signal = signal_test(features, votes, conversations, spec, settings.reward, settings.gate.signal_p, None)
    if not signal.passed:
        return {"p_value": signal.p_value, "state": "rejected"}
    data = work / "cells" / cell.name
    make_data(work, data, cell, pairs)
    report = run_round(data, cell.seed)
    rmtree(data)
    return {"p_value": signal.p_value, "state": report["state"], "sentence": report["sentence"]}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
