"""Whether a round trains on long answers as well as on short ones.

    python benchmarks/lengths.py MODEL --work-dir DIR [--tokens 256] [--only CELL...] [--write]

Voters of a taste (`clients.demo.voter`) compare 200 pairs of the reference's answers, each of up to `--tokens` tokens;
a tenth of their choices is flipped. Then `learner run-once` runs twice on the same votes: with updates that are smaller
for long answers, as it ships, and with the whole learning rate. Each one's newest candidate answers 128 questions that
nobody voted on; its win rate over the reference is by the taste itself, a draw is half.

Each result is saved as it is computed, so that a killed run resumes after the last one. `--write` writes
docs/benchmarks/lengths.md. Prints one JSON line last.
"""

import argparse
import json
import random
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

from kept import kept
from study import run_json, run_round
from voted import cast, make_data, scores, win_rate, wins

from clients.demo.questions import questions

REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "lengths.md"
VOTES, UNSEEN = 200, 128
# The mean length up to which updates take the whole learning rate, by arm; None: the default.
ARMS = {"smaller": None, "whole": 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory, as in a data directory's policies/v0000")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256, help="the length limit of every answer")
    parser.add_argument("--only", nargs="+", metavar="TASTE", default=["gentle", "crisp"])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--step", choices=["ask", "evaluate"], help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, tokens = arguments.work_dir.resolve(), arguments.tokens
    if arguments.step:
        [taste] = arguments.only
        print(json.dumps({"ask": ask, "evaluate": evaluate}[arguments.step](arguments.data, taste, tokens)))
        return
    results = {}
    for taste, arm in product(arguments.only, ARMS):
        name = f"{taste}-{tokens}-{arm}"
        path = work / "results" / f"{name}.json"
        results[name] = kept(path, partial(one_round, work, arguments.model, taste, tokens, arm))
    if arguments.write:
        REPORT.write_text("\n".join(page(results)) + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": "lengths", "results": results}))


def one_round(work: Path, model: Path, taste: str, tokens: int, arm: str) -> dict[str, Any]:
    """A round on the votes of this taste, and how good its newest candidate is."""
    voted, data = work / f"{taste}-{tokens}", work / f"{taste}-{tokens}-{arm}"
    if not (voted / "voted").exists():
        rmtree(voted, ignore_errors=True)
        make_data(model, voted)
        step(voted, taste, tokens, "ask")
        (voted / "voted").touch()
    rmtree(data, ignore_errors=True)
    copytree(voted, data)
    whole = ARMS[arm]
    updates = {"PREFLOOP_PPO__FULL_STEP_TOKENS": str(whole)} if whole else {}
    # The taste says more about the candidate than the judge on more prompts would.
    report = run_round(data, 0, PREFLOOP_GATE__CONFIRM_PROMPTS="64", **updates)
    metrics = report["metrics"]
    steps = metrics.get("improvement", {}).get("steps", [])
    return {
        "state": report["state"],
        "sentence": report["sentence"],
        "minutes": round(sum(metrics["seconds"].values()) / 60, 1),
        "reward_model": metrics.get("reward_model", {}).get("accuracy"),
        "kl": [round(one["kl"], 2) for one in steps],
        "length": [round(one["length"]) for one in steps],
        "chosen": metrics.get("gate", {}).get("chosen"),
        **step(data, taste, tokens, "evaluate"),
    }


def step(data: Path, taste: str, tokens: int, name: str) -> dict[str, Any]:
    """Runs a step of this program in a separate process, which owns an engine."""
    arguments = ["--step", name, "--data", str(data), "--only", taste, "--tokens", str(tokens)]
    return run_json([__file__, "-", "--work-dir", str(data.parent), *arguments])


def ask(data: Path, taste: str, tokens: int) -> dict[str, Any]:
    """Samples comparisons of the reference's answers and votes on them."""
    chance = random.Random(f"{taste} {tokens}")
    seen = questions(0)[UNSEEN:]
    cast(data, taste, chance, [chance.choice(seen) for _ in range(VOTES)], tokens, 0)
    return {"asked": VOTES}


def evaluate(data: Path, taste: str, tokens: int) -> dict[str, Any]:
    """How often the newest version's answers to unseen questions are better than the reference's, by the taste."""
    asked = questions(0)[:UNSEEN]
    version = max(path.name for path in (data / "policies").glob("v[0-9]*"))
    reference = data.parent / "references" / f"{taste}-{tokens}.json"
    before = kept(reference, partial(scores, data, "v0000", taste, asked, tokens))
    after = before if version == "v0000" else scores(data, version, taste, asked, tokens)
    return {"version": version, "win_rate": win_rate(wins(after, before))}


# The page


def page(results: dict[str, Any]) -> Iterator[str]:
    """Its lines."""
    yield "# Rounds on long answers"
    yield ""
    yield "`python benchmarks/lengths.py --write`: the program's docstring says what is done. The win rate over the"
    yield f"reference is on {UNSEEN} questions that nobody voted on, by the taste itself."
    yield ""
    titles = ["taste, tokens, updates", "reward model", "KL by step", "chosen step", "its KL", "repetition"]
    yield f"| {' | '.join([*titles, 'by the judge', 'win rate'])} |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for name, one in results.items():
        chosen = one["chosen"]
        told = ["", "", "", ""]
        if chosen:
            against = chosen["against_incumbent"]
            told = [
                str(chosen["step"]),
                f"{chosen['kl']:.1f}",
                f"{chosen['health']['repetition']:.3f}",
                f"{against['rate']:.2f} [{against['low']:.2f}, {against['high']:.2f}]",
            ]
        kl = ", ".join(f"{step:.1f}" for step in one["kl"])
        accuracy = "" if one["reward_model"] is None else f"{one['reward_model']:.2f}"
        yield f"| {name} | {accuracy} | {kl} | {' | '.join(told)} | {one['win_rate']:.3f} |"


if __name__ == "__main__":
    main()
