"""How the cost of a round's first stages grows with the votes in the store: seconds, peak memory, exponents.

    python benchmarks/growth.py --work-dir DIR [--votes 1000 10000 100000 1000000] [--write]

One store grows from size to size: comparisons of 64-token answers, each with a vote, written to the real tables. At
every size a separate process runs the first stages of a round: count the votes, take the snapshot, build the dataset,
read the prompts, test for a signal, fit the reward model and the judge. Features are random numbers; everything else
is real. A round uses the newest `max_votes` votes (20,000); `--all` also runs without this limit, to show its effect.
Each result is saved as it is computed, so that a killed benchmark resumes. Prints one JSON line last; `--write` writes
docs/benchmarks/growth.md.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from kept import kept, measured_apart

TOKENS, PROMPT, FEATURES = 64, 40, 2881
LAYERS = (1, 2), (3, 4, 5)
BATCH = 20_000
EVERYTHING = 10**9
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks" / "growth.md"
STAGES = ("count", "snapshot", "dataset", "prompts", "signal", "fit", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--votes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--all", action="store_true", help="also without the limit, up to 100,000 votes")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--measure", choices=["limited", "all"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data = arguments.work_dir / "data"
    if arguments.measure:
        print(json.dumps(measure(data, limited=arguments.measure == "limited")))
        return
    results: dict[str, dict[int, Any]] = {"limited": {}, "all": {}}
    for votes in sorted(arguments.votes):
        for mode in ["limited"] + ["all"] * (arguments.all and votes <= 100_000):
            path = arguments.work_dir / f"{mode}-{votes}.json"
            results[mode][votes] = kept(path, partial(measured, arguments.work_dir, mode, votes))
    if arguments.write:
        REPORT.write_text(page(results), encoding="utf-8")
    print(json.dumps({"benchmark": "growth", "results": results}))


def grow(data: Path, votes: int) -> None:
    """Adds comparisons and votes until there are `votes`."""
    from sqlite_utils import Database

    from server.store.store import Store

    data.mkdir(parents=True, exist_ok=True)
    store = Store.open(data)
    have = store.snapshots.count_votes()
    store.close()
    if have > votes:
        sys.exit(f"{data} has {have:,} votes already: it can only grow, so begin in an empty --work-dir.")
    db = Database(str(data / "prefloop.db"))
    for start in range(have, votes, BATCH):
        numbers = range(start, min(start + BATCH, votes))
        for table in ("conversations", "responses", "comparisons", "feedback", "feedback_events"):
            db.table(table).insert_all(rows(table, numbers))
    db.close()


def rows(table: str, numbers: range) -> Iterator[dict[str, Any]]:
    """The rows that one vote per number leaves in a table."""
    from server.store.packing import pack_floats, pack_ints

    for n in numbers:
        user, now = f"user{n % 1000}", 1.7e9 + n
        responses = [f"resp_{n}a", f"resp_{n}b"]
        vote = {"user": user, "kind": "choice", "comparison_id": f"cmp_{n}", "value": "AB"[n % 2], "create_time": now}
        if table == "conversations":
            yield {"id": f"conv_{n}", "user": user, "title": "?", "create_time": now, "update_time": now}
        elif table == "responses":
            for slot, response_id in enumerate(responses):
                tokens = [(n * 7 + slot + i) % 49_152 for i in range(TOKENS)]
                yield {
                    "id": response_id, "conversation_id": f"conv_{n}", "user": user, "replica_id": "r",
                    "status": "finished", "prompt_token_ids": pack_ints([n % 5_000] * PROMPT),
                    "token_ids": pack_ints(tokens), "logprobs": pack_floats([-1.0] * TOKENS), "text": "word " * 40,
                    "temperature": (0.7, 1.0)[slot], "max_tokens": TOKENS, "seed": None, "finish_reason": "length",
                    "policy_version": "v0000", "create_time": now,
                }  # fmt: skip
        elif table == "comparisons":
            yield {
                "id": f"cmp_{n}", "conversation_id": f"conv_{n}", "user": user, "response_a": responses[0],
                "response_b": responses[1], "state": "chosen", "continued_with": "A", "create_time": now,
            }  # fmt: skip
        elif table == "feedback":
            yield {"id": f"fb_{n}", "event_seq": n + 1, "comment": "", **vote}
        else:
            yield {"seq": n + 1, "action": "submit", "feedback_id": f"fb_{n}", "comment": "", **vote}


def measured(work: Path, mode: str, votes: int) -> dict[str, Any]:
    """Measures a store of this many votes in a separate process, with its peak memory."""
    grow(work / "data", votes)
    command = [sys.executable, __file__, "--work-dir", str(work), "--measure", mode]
    found = measured_apart(command)
    found["peak_gib"] = round(found.pop("peak_mib") / 2**10, 2)
    return found


def measure(data: Path, limited: bool) -> dict[str, float]:
    import torch

    from learner.gate.win_rate import fit_judge
    from learner.model.features import FeatureSpec
    from learner.reward.dataset import of_groups, select, some_conversations, to_dataset
    from learner.reward.linear_reward_model import LinearRewardModel
    from learner.reward.sign_flips import signal_test
    from learner.settings import LearnerSettings
    from server.store.store import Store

    settings = LearnerSettings()
    votes, prompts = (settings.max_votes, settings.max_prompts) if limited else (EVERYTHING, EVERYTHING)
    store = Store.open(data)
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        seconds[stage] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()

    store.snapshots.count_votes()
    lap("count")
    snapshot = store.snapshots.take(limit=votes)
    lap("snapshot")
    dataset = to_dataset(snapshot, 1.7e9 + 2e6, settings.gate.judge_share, settings.reward, lambda text, ended: [0])
    del snapshot
    lap("dataset")
    store.snapshots.prompts(limit=prompts)
    lap("prompts")
    store.close()
    generator, reward = torch.Generator().manual_seed(0), settings.reward
    features, spec = torch.randn(len(dataset.answers), FEATURES, generator=generator), FeatureSpec(*LAYERS)
    started = time.perf_counter()
    shown, conversations = dataset.shown
    some = some_conversations(shown, reward.signal_votes if limited else len(shown), generator)
    signal_test(
        features, select(shown, some), of_groups(conversations, some), spec, reward, settings.gate.signal_p, None
    )
    lap("signal")
    fitted = LinearRewardModel.fit(features, dataset.train, spec, reward, generator)
    lap("fit")
    fit_judge(
        features, dataset.judge, fitted.standardiser, fitted.l2, reward.label_smoothing, settings.gate.refits, generator
    )
    lap("judge")
    return seconds


def exponent(by_votes: dict[int, Any], figure: str) -> float:
    """Least-squares slope of log(figure) over log(votes)."""
    points = [(math.log(votes), math.log(max(found[figure], 0.01))) for votes, found in by_votes.items()]
    x, y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return float(sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points))


def page(results: dict[str, dict[int, Any]]) -> str:
    lines = ["# What a round costs as votes grow", ""]
    lines.append(f"`python benchmarks/growth.py --write`, {datetime.now(UTC):%Y-%m-%d}. Seconds, and peak GiB.")
    for mode, title in (("limited", "With a round's limit: the newest 20,000 votes"), ("all", "Without that limit")):
        if len(by_votes := results[mode]) < 2:
            continue
        lines += ["", f"## {title}", "", "| votes | " + " | ".join(STAGES) + " | peak, GiB |"]
        lines.append("|---:|" + "---:|" * (len(STAGES) + 1))
        for votes, found in by_votes.items():
            cells = [f"{found[stage]:.2f}" for stage in (*STAGES, "peak_gib")]
            lines.append(f"| {votes:,} | " + " | ".join(cells) + " |")
        slopes = [f"{exponent(by_votes, stage):.2f}" for stage in (*STAGES, "peak_gib")]
        lines.append("| exponent | " + " | ".join(slopes) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
