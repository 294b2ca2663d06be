"""Kills a round and a server at every point where something becomes durable, and checks what is left.

    python benchmarks/crash.py --work-dir DIR [--write]

The round is a whole one on a tiny model (`tests/learner/crash.py`), the server a real one over gRPC with a fake engine
(`tests/server/crash.py`). Each failpoint is triggered the first time it is passed, the second, and so on, until a run
ends without being killed. After each kill this checks SQLite's integrity_check, that every acknowledged vote is there,
that no version is incomplete, and that the next run ends the round with each vote in it once. `--write` puts the table
into docs/benchmarks/crash.md. Prints one JSON line last.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import pysqlite3.dbapi2 as sqlite3  # noqa: E402
from kept import kept  # noqa: E402

from server.store.store import Store  # noqa: E402
from tests.learner.conftest import save_tiny_model, tiny_llama  # noqa: E402
from tests.learner.crash import run_round, violations  # noqa: E402
from tests.learner.rounds import low_words, make_reference, make_version, vote  # noqa: E402
from tests.server.crash import vote_until_killed  # noqa: E402

ROUND_POINTS = ("commit", "committed", "fsync", "rename", "renamed", "prune")
VOTE_POINTS = ("commit", "committed")
TURNS = 6
REPORT = HERE.parent / "docs" / "benchmarks" / "crash.md"
WHAT = {"round": "a whole round", "votes": f"a server and {2 * TURNS} votes in {TURNS} chats"}

# Runs with a failpoint and returns what was wrong after the kill, or None if the run was not killed.
Kill = Callable[[Path, str], list[str] | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    work: Path = arguments.work_dir.resolve()
    make_data(work)
    results = {
        "round": {point: kills(work, "round", point, kill_round) for point in ROUND_POINTS},
        "votes": {point: kills(work, "votes", point, kill_server) for point in VOTE_POINTS},
    }
    if arguments.write:
        REPORT.write_text(report(results))
    print(json.dumps({"benchmark": "crash", "results": results}))


def make_data(work: Path) -> None:
    """A tiny reference, eighty votes, and three old versions to prune."""
    if (work / "data" / "ready").exists():
        return
    shutil.rmtree(work / "data", ignore_errors=True)
    save_tiny_model(work / "model")
    make_reference(work / "data", work / "model")
    with closing(Store.open(work / "data")) as store:
        vote(store, tiny_llama(), 80, low_words)
    for version in ("v0001", "v0002", "v0003"):
        make_version(work / "data", version)
    (work / "data" / "ready").touch()


def kills(work: Path, what: str, point: str, kill: Kill) -> list[list[str]]:
    """What was wrong after each kill at `point`: the first time it is passed, the second, and so on."""
    found: list[list[str]] = []
    for number in count(1):
        wrong = kept(work / "results" / what / f"{point}-{number}.json", partial(kill, work, f"{point}:{number}"))
        if wrong is None:
            return found
        found.append(wrong)
    raise AssertionError


def kill_round(work: Path, failpoint: str) -> list[str] | None:
    data = work / "run"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(work / "data", data)
    with closing(Store.open(data)) as store:
        votes = {vote.id for vote in store.feedback.page("ann", 10_000)}
    if run_round(data, failpoint):
        return None
    wrong = violations(data, votes)
    if not run_round(data):
        return [*wrong, "the next run was killed"]
    wrong += violations(data, votes)
    with closing(Store.open(data)) as store:
        (*_, first) = rounds = store.rounds.page()
        learned = len(store.lineage.round_votes(first.id))
    if (len(rounds), first.state, learned) != (1, "promoted", len(votes)):
        wrong.append(f"{len(rounds)} rounds, {first.state}, {learned} of {len(votes)} votes")
    return wrong + [f"left behind: {path.name}" for path in data.rglob("*.partial")]


def kill_server(work: Path, failpoint: str) -> list[str] | None:
    data = work / "served"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    acknowledged, killed = vote_until_killed(data, failpoint, TURNS)
    if not killed:
        return None
    with closing(Store.open(data)) as store:
        kept_votes = {vote.id: vote.value for vote in store.feedback.page("ann", 100)}
    with closing(sqlite3.connect(data / "prefloop.db")) as connection:
        intact = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    lost = [vote for vote in acknowledged if vote not in kept_votes]
    return [f"{len(lost)} acknowledged votes are gone"] * bool(lost) + ["integrity_check failed"] * (not intact)


def report(results: dict[str, dict[str, list[list[str]]]]) -> str:
    lines = [
        "# Kills at every point of durability",
        "",
        "Made by [`benchmarks/crash.py`](../../benchmarks/crash.py), whose docstring says what is killed and checked.",
        "Each failpoint was tried at every pass.",
        "",
        "| killed | failpoint | kills | with something wrong after |",
        "|---|---|---:|---:|",
    ]
    for what, points in results.items():
        for point, found in points.items():
            wrong = sum(bool(reasons) for reasons in found)
            lines.append(f"| {WHAT[what]} | {point} | {len(found)} | {wrong} |")
    everything = [reasons for points in results.values() for found in points.values() for reasons in found]
    lines += ["", f"{len(everything)} kills in total, {sum(map(bool, everything))} with something wrong afterwards."]
    lines += [f"- {reason}" for reasons in everything for reason in reasons]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
