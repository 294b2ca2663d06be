"""Trains by workers, which are started again if one of them was killed."""

from collections.abc import Callable

import torch

from learner.model.device import resolve_device
from learner.worker_settings import WorkerSettings
from learner.workers.job import KilledError, TrainingJob
from learner.workers.ray_actors import check_cluster
from learner.workers.ray_actors import run as run_on_ray
from learner.workers.step_log import followed
from learner.workers.torchrun import run as run_here
from server.shared.errors import FailedPreconditionError
from server.store.learning.round_metrics import Improvement, StepMetrics


def train_by_workers(
    job: TrainingJob, settings: WorkerSettings, on_step: Callable[[StepMetrics], None], say: Callable[[str], None]
) -> Improvement:
    """Trains; `on_step` hears of each step, and `say` of workers that start again. Raises RuntimeError if a worker
    failed, or too many were killed."""
    with followed(job.directory, on_step):
        for left in reversed(range(settings.restarts + 1)):
            try:
                return start(job, settings)
            except KilledError as error:
                if not left:
                    raise
                say(f"{error} All start again, from the last state.")
    raise AssertionError("the last start has returned or raised")


def check_workers(settings: WorkerSettings, learner_device: str) -> None:
    """Raises FailedPreconditionError if there is not what the workers need, before a round spends anything."""
    if settings.ray:
        check_cluster(settings, learner_device)
    elif settings.count and resolve_device(learner_device).type == "cuda":
        needed, there = settings.count * settings.gpus_each, torch.cuda.device_count()
        if there < needed:
            raise FailedPreconditionError(
                "NO_GPU",
                f"{settings.count} workers need {needed} GPUs, and {there} can be seen: lower "
                "PREFLOOP_WORKERS__COUNT, or set PREFLOOP_WORKERS__ENGINES to inside.",
            )


def start(job: TrainingJob, settings: WorkerSettings) -> Improvement:
    """Starts them once."""
    if settings.ray:
        return run_on_ray(job, settings)
    return run_here(job, settings.count)
