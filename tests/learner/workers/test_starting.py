"""What workers are told, and what they are not started without."""

import json
import threading
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.model.worker_group import WorkerGroup
from learner.process import set_environment
from learner.settings import LearnerSettings
from learner.worker_settings import WorkerSettings
from learner.workers.launch import check_workers
from learner.workers.ray_actors import environments, require_token
from learner.workers.step_log import FILE, StepLog, followed
from server.shared.errors import FailedPreconditionError
from server.store.learning.round_metrics import StepMetrics


def figures(step: int) -> StepMetrics:
    return StepMetrics(**{**{field.name: 0 for field in fields(StepMetrics)}, "step": step})


def test_every_part_counts_once_and_all_workers_take_as_many_turns() -> None:
    parts = [torch.tensor([number]) for number in range(5)]
    turns = [[(int(part), counts) for part, counts in WorkerGroup(rank, 3).turns(parts)] for rank in range(3)]
    assert turns == [[(0, True), (3, True)], [(1, True), (4, True)], [(2, True), (3, False)]]
    assert [int(part) for part, counts in WorkerGroup().turns(parts) if counts] == [0, 1, 2, 3, 4]


def test_shares_are_in_a_row_and_as_equal_as_can_be() -> None:
    assert WorkerGroup(0, 3).shares(8) == [range(2), range(2, 5), range(5, 8)]
    assert WorkerGroup(0, 2).shares(1) == [range(0), range(1)]
    assert WorkerGroup().shares(8) == [range(8)]


def test_workers_on_two_nodes_are_told_who_leads_and_how_many_share_a_node() -> None:
    told = environments([("10.0.0.1", 4000), ("10.0.0.2", 5000), ("10.0.0.1", 6000)])
    assert told == [
        {
            "RANK": rank,
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": here,
            "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "4000",
        }
        for rank, here in (("0", "2"), ("1", "1"), ("2", "2"))
    ]


def test_ray_is_not_used_without_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Set back afterwards: `set_environment` leaves what is set already.
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")
    set_environment(LearnerSettings(workers={"count": 2, "ray": "10.0.0.1:6379"}))
    with pytest.raises(FailedPreconditionError, match=r"There is no token for the Ray cluster: set RAY_AUTH_TOKEN or"):
        require_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    require_token()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret", encoding="utf-8")
    require_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(FailedPreconditionError, match=r"RAY_AUTH_MODE must be token"):
        require_token()


def test_ray_without_a_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"workers\.ray needs workers\.count"):
        LearnerSettings(workers={"ray": "10.0.0.1:6379"})


def test_a_round_hears_of_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of workers that start again, and not of half a line."""
    monkeypatch.setattr("learner.workers.step_log.POLL_SECONDS", 0.01)
    heard: list[Any] = []
    said = threading.Semaphore(0)

    def hear(step: StepMetrics) -> None:
        heard.append(step.step)
        said.release()

    with followed(tmp_path, hear):
        log = StepLog(tmp_path)
        log.write(figures(0))
        log.write(figures(1))
        assert said.acquire(timeout=10)
        assert said.acquire(timeout=10)
        again = StepLog(tmp_path)
        again.write(figures(0))
        again.write(figures(1))
        line = json.dumps(asdict(figures(2))) + "\n"
        with (tmp_path / FILE).open("a", encoding="utf-8") as file:
            file.write(line[:20])
            file.flush()
            file.write(line[20:])
        assert said.acquire(timeout=10)
    assert heard == [0, 1, 2]
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("engines", "there", "told"),
    [
        ("inside", 2, ""),
        ("inside", 1, "2 workers need 2 GPUs, and 1"),
        ("apart", 3, "2 workers need 4 GPUs, and 3"),
        ("apart", 4, ""),
    ],
)
def test_a_round_does_not_begin_without_its_workers_gpus(
    engines: Any, there: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.workers.launch.resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    expected = pytest.raises(FailedPreconditionError, match=told) if told else nullcontext()
    with expected:
        check_workers(WorkerSettings(count=2, engines=engines), "cuda")
