"""A learner is stopped (SIGSTOP) for longer than its lease, and continues (SIGCONT) after another one took over: it
ends with one sentence, and changes neither the database nor a file.
"""

import hashlib
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from learner.progress import Stages
from learner.round.run import run_once
from server.shared.errors import ConflictError
from server.store.store import Store
from tests.learner.round.test_resume import PROCESSES, SECONDS, before_call
from tests.learner.rounds import TinyEngine, passing, settings
from tests.tiers import slow

LEASE_SECONDS = 1.0


def run(data_dir: Path) -> None:
    import learner.round.gate.gate_stage
    import learner.round.workspace

    learner.round.workspace.RolloutEngine = TinyEngine  # type: ignore[assignment, misc]
    learner.round.gate.gate_stage.decide = passing
    # As in `learner run-once`.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ppo = settings(data_dir).ppo.model_copy(update={"steps": 4, "epochs": 2})
    run_once(settings(data_dir, ppo=ppo, lease_seconds=LEASE_SECONDS), Stages(Console(quiet=True)))


def run_and_stop(data_dir: Path, call: str, count: int, stopped: Any, said: Any) -> None:
    """Runs a round in this process, which stops as it makes `call` (`module:name`) for the `count`th time."""

    def stop() -> None:
        stopped.send(os.getpid())
        os.kill(os.getpid(), signal.SIGSTOP)

    before_call(call, count, stop)
    try:
        run(data_dir)
    except ConflictError as error:
        said.send(str(error))


def contents(data_dir: Path) -> dict[str, str]:
    """Every file's checksum, except for databases, locks and TensorBoard's files, which differ by process."""
    return {
        str(path.relative_to(data_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(data_dir.rglob("*"))
        if path.is_file() and not path.name.startswith(("prefloop.db", ".keeping", "features-", "events.out."))
    }


def recorded(data_dir: Path) -> list[Any]:
    with closing(Store.open(data_dir)) as store:
        return [store.rounds.page(), store.policies.page(), store.reward_models.all()]


@pytest.mark.parametrize(
    ("call", "count"),
    [
        ("learner.improve.ppo.trainer:ppo_update", 3),  # the middle of a step
        slow("server.store.files.manifest:publish", 4),  # a state written, not yet renamed
        slow("learner.round.gate.gate_stage:keep_answers", 1),  # about to write the answers
        ("server.store.files.manifest:publish", 6),  # the version written, not yet renamed
        slow("server.store.learning.policies:Policies.activate", 1),  # about to move the pointer
    ],
)
def test_a_learner_that_continues_after_another_took_over_changes_nothing(
    voted: Path, tmp_path: Path, call: str, count: int
) -> None:
    data_dir = tmp_path / "data"
    shutil.copytree(voted, data_dir)
    (stopped, stopping), (said, saying) = PROCESSES.Pipe(duplex=False), PROCESSES.Pipe(duplex=False)
    sleeper = PROCESSES.Process(target=run_and_stop, args=(data_dir, call, count, stopping, saying))
    sleeper.start()
    try:
        assert stopped.poll(SECONDS)
        pid = stopped.recv()
        other = PROCESSES.Process(target=run, args=(data_dir,))
        other.start()
        other.join(SECONDS)
        assert other.exitcode == 0
        [round_] = recorded(data_dir)[0]
        assert (round_.state, round_.attempts) == ("promoted", 2), round_.reason
        files, records = contents(data_dir), recorded(data_dir)
        os.kill(pid, signal.SIGCONT)
        sleeper.join(SECONDS)
        assert sleeper.exitcode == 0
        assert said.recv().startswith("The lease 'learner' went to ")
        assert recorded(data_dir) == records
        assert contents(data_dir) == files
    finally:
        sleeper.kill()
        sleeper.join(SECONDS)
