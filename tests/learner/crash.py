"""A round, and a stream of votes, in a process that kills itself at a failpoint; and what must be true afterwards.

Used by the tests, for some of the places, and by `benchmarks/crash.py`, for all.
"""

import multiprocessing
import os
import signal
from contextlib import closing
from pathlib import Path

import pysqlite3.dbapi2 as sqlite3
from rich.console import Console

from learner.progress import Stages
from learner.round.run import run_once
from server.shared.errors import ManifestError
from server.shared.failpoints import VARIABLE
from server.store.files.manifest import verify
from server.store.store import Store
from tests.learner.rounds import TinyEngine, passing, settings

SECONDS = 240
# Where a round's process finds the store and the versions; it does not have this one's environment.
PLACES = ("PREFLOOP_STORE_URL", "PREFLOOP_POLICY_URL")
# Imported once, in a process that has never computed: a fork of this one would inherit OpenMP's dead threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["learner.round.run", "learner.model.policy", "peft", "transformers", "tests.learner.rounds"]
)


def round_with(data_dir: Path, environment: dict[str, str]) -> None:
    """A whole round on the tiny model, its gate passing; keeps one old version."""
    import learner.round.gate.gate_stage
    import learner.round.workspace

    os.environ |= environment
    learner.round.workspace.RolloutEngine = TinyEngine  # type: ignore[assignment, misc]
    learner.round.gate.gate_stage.decide = passing
    run_once(settings(data_dir, keep_versions=1), Stages(Console(quiet=True)))


def run_round(data_dir: Path, failpoint: str = "") -> bool:
    """Whether the round finished in a separate process; False if the failpoint killed it."""
    environment = {VARIABLE: failpoint} | {name: os.environ.get(name, "") for name in PLACES}
    process = PROCESSES.Process(target=round_with, args=(data_dir, environment))
    process.start()
    process.join(SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


def violations(data_dir: Path, votes: set[str]) -> list[str]:
    """What is wrong with a data directory right after a kill; `votes` were acknowledged before it."""
    found = []
    file = data_dir / "prefloop.db"
    with closing(sqlite3.connect(file if file.exists() else ":memory:")) as connection:
        if (check := connection.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
            found.append(f"integrity_check: {check}")
    with closing(Store.open(data_dir)) as store:
        kept = {vote.id for vote in store.feedback.page("ann", 10_000)}
        rounds = [round_.id for round_ in store.rounds.page()]
        active = store.policies.active().version
        whole = {p.version for p in store.policies.page() if p.prune_time is None}
        sides = [len(store.lineage.round_votes(round_id)) for round_id in rounds]
    if lost := votes - kept:
        found.append(f"{len(lost)} acknowledged votes are gone")
    if any(count > len(votes) for count in sides):
        found.append("a round learned from more votes than there are")
    if active not in whole:
        found.append(f"{active} is active and pruned")
    for folder in ("policies", "reward_models"):
        for path in (data_dir / folder).glob("[!.]*"):
            try:
                verify(path)
            except ManifestError as error:
                if path.name in whole or folder == "reward_models":
                    found.append(f"half-made: {error}")
    return found
