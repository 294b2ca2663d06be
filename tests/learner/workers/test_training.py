"""Workers that train together: the same numbers as one process, whatever their number, and after any kill."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import learner.workers.torchrun as torchrun
from learner.improve.base import ExperienceSource, Task
from learner.improve.budget import Budget
from learner.improve.improvers import make_improver
from learner.model.policy import TrainablePolicy
from learner.worker_settings import WorkerSettings
from learner.workers.job import KilledError, TrainingJob
from learner.workers.launch import train_by_workers
from server.shared.model.dtype import torch_dtype
from server.store.chats.records import Prompt
from server.store.learning.round_metrics import Improvement, StepMetrics
from tests.learner.improve.dpo.test_votes import choices, weighed
from tests.learner.improve.ppo.test_experience import reward_model
from tests.learner.rounds import settings
from tests.learner.workers.engines import WorkersEngine, noted, worker
from tests.tiers import slow

Train = Callable[..., tuple[list[StepMetrics], dict[str, Tensor]]]
STEPS = 3
TRAINING: dict[str, dict[str, Any]] = {
    "ppo": {"steps": STEPS, "episodes": 9, "epochs": 2, "learning_rate": 1e-3, "approx_kl_stop": 10.0},
    "rloo": {"steps": STEPS, "episodes": 8, "answers": 4, "learning_rate": 1e-3, "approx_kl_stop": 10.0},
    "dpo": {"steps": STEPS, "episodes": 9, "votes": 6, "learning_rate": 1e-3},
}


@pytest.fixture(autouse=True)
def _tiny_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "worker", worker)


def make_job(
    directory: Path, model: Path, improver: str = "ppo", dtype: Any = "float32", kind: Any = "lora", **changes: Any
) -> TrainingJob:
    """Nine prompts of different lengths: not every worker has as many micro-batches of them."""
    directory.mkdir()
    reward_model().save(directory)
    training = {**TRAINING[improver], **changes}
    policy = {"lora_rank": 4, "train": kind, "micro_batch_tokens": 40}
    return TrainingJob(
        settings=settings(directory, improver=improver, dtype=dtype, policy=policy, threads=1, **{improver: training}),
        dtype=dtype,
        reference=model,
        start=None,
        reward_model=directory,
        prompts=[Prompt(str(number), [*range(5, 10 + number), 20 + number], 6) for number in range(9)],
        votes=weighed(choices([0, 2, 4], [1, 3, 5], [0, 1, 0], [(6, 1.0, 0), (7, 0.0, 1)]), 8, 0.05),
        budget=Budget(100.0),
        longest=64,
        directory=directory,
    )


def alone(job: TrainingJob) -> Improvement:
    """The same job in this process, without workers."""
    policy = TrainablePolicy.create(job.reference, job.settings.policy, torch_dtype(job.dtype), torch.device("cpu"))
    engine: Any = WorkersEngine(job.reference, job.settings, job.dtype, job.longest)
    source = ExperienceSource(engine, job.prompts, job.settings.service_temperature, job.settings.seed)
    task = Task(policy, source, reward_model(), job.budget, job.directory, lambda step: None)
    return make_improver(job.settings, job.votes).improve(task)


def together(job: TrainingJob, count: int, restarts: int = 0) -> tuple[Improvement, list[StepMetrics], list[str]]:
    """What workers return, the steps that the round hears of, and what it says."""
    heard: list[StepMetrics] = []
    said: list[str] = []
    found = train_by_workers(job, WorkerSettings(count=count, restarts=restarts), heard.append, said.append)
    return found, heard, said


def trained(job: TrainingJob) -> dict[str, Tensor]:
    """The weights of the last candidate."""
    [file] = (job.directory / f"step-{STEPS:03d}").glob("*.safetensors")
    return load_file(file)


def assert_same(job: TrainingJob, found: Improvement, other: TrainingJob, expected: Improvement, within: float) -> None:
    assert len(found.steps) == STEPS
    for ours, theirs in zip(found.steps, expected.steps, strict=True):
        assert asdict(ours) == pytest.approx(asdict(theirs), rel=within, abs=within, nan_ok=True)
    weights, others = trained(job), trained(other)
    assert weights.keys() == others.keys()
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) <= within
    assert any(
        float(tensor.abs().max()) > 1e-4 for name, tensor in weights.items() if "lora_B" in name or "norm" in name
    )


@pytest.mark.parametrize(
    ("improver", "kind"), [("ppo", "lora"), slow("ppo", "full"), slow("rloo", "lora"), slow("dpo", "lora")]
)
def test_workers_make_the_updates_of_one_process(
    tmp_path: Path, model_directory: Path, improver: str, kind: str
) -> None:
    """In float32, to 1e-5: one worker that is sharded all the same, and two."""
    plain = make_job(tmp_path / "plain", model_directory, improver, kind=kind)
    expected = alone(plain)
    for count in (1, 2):
        job = make_job(tmp_path / str(count), model_directory, improver, kind=kind)
        found, heard, _ = together(job, count)
        assert_same(job, found, plain, expected, 1e-5)
        assert [step.score for step in heard] == [step.score for step in found.steps]
        assert (found.candidates, found.ended_by) == ([1, 2, 3], "steps")
        for rank in range(count):
            share = (
                job.settings.training.episodes * (rank + 1) // count - job.settings.training.episodes * rank // count
            )
            assert noted(job.directory, f"sampled-{rank}") == [share] * STEPS
            assert noted(job.directory, f"held-{rank}") == [pytest.approx(1 / count, abs=0.02)]


def test_engines_apart_sample_the_same(tmp_path: Path, model_directory: Path) -> None:
    inside, apart = (make_job(tmp_path / name, model_directory) for name in ("inside", "apart"))
    expected = alone(inside)
    workers = WorkerSettings(count=2, engines="apart")
    apart = replace(apart, settings=apart.settings.model_copy(update={"workers": workers}))
    found, _, _ = together(apart, 2)
    assert_same(apart, found, inside, expected, 1e-5)


def test_a_killed_worker_ends_nothing(tmp_path: Path, model_directory: Path) -> None:
    """Killed as it samples for the third step: all start again, from the state after the second."""
    unbroken, job = (make_job(tmp_path / name, model_directory) for name in ("unbroken", "killed"))
    expected, _, _ = together(unbroken, 2)
    seed_of_third_step = 3
    (job.directory / "kill-1").write_text(str(seed_of_third_step), encoding="utf-8")
    found, heard, said = together(job, 2, restarts=1)
    assert said == ["Worker 1 was killed (SIGKILL). All start again, from the last state."]
    assert [step.step for step in heard] == [0, 1, 2]
    # The lead sampled for the third step twice, and for no other again.
    assert noted(job.directory, "sampled-0") == [4] * 4
    assert_same(job, found, unbroken, expected, 0.0)


def test_too_many_kills_end_the_job(tmp_path: Path, model_directory: Path) -> None:
    job = make_job(tmp_path / "job", model_directory)
    (job.directory / "kill-0").write_text("1", encoding="utf-8")
    with pytest.raises(KilledError, match=r"^Worker 0 was killed \(SIGKILL\)\.$"):
        together(job, 1)


@pytest.mark.parametrize(("first", "then"), [(2, 1), slow(0, 2), slow(2, 0), slow(1, 2)])
def test_another_number_of_workers_resumes(tmp_path: Path, model_directory: Path, first: int, then: int) -> None:
    """Two steps by `first` workers and the third by `then`; 0: in one process, without workers."""
    plain = make_job(tmp_path / "plain", model_directory)
    expected = alone(plain)
    job = make_job(tmp_path / "job", model_directory)
    begun = replace(job, settings=settings_of(job, steps=2))
    together(begun, first) if first else alone(begun)
    found = together(job, then)[0] if then else alone(job)
    assert_same(job, found, plain, expected, 1e-5)
    if then:
        assert len(noted(job.directory, "sampled-0")) == (STEPS if first else 1)


def settings_of(job: TrainingJob, **changes: Any) -> Any:
    return job.settings.model_copy(update={"ppo": job.settings.ppo.model_copy(update=changes)})


def test_a_worker_that_fails_says_why(tmp_path: Path, model_directory: Path) -> None:
    job = make_job(tmp_path / "job", model_directory)
    with pytest.raises(RuntimeError, match=r"^Worker [01] failed: .*No such file") as raised:
        together(replace(job, reward_model=tmp_path / "nowhere"), 2, restarts=3)
    assert not isinstance(raised.value, KilledError)
