"""Trains by workers, which are started again if one of them was killed."""

from collections.abc import Callable

from learner.worker_settings import WorkerSettings
from learner.workers.job import KilledError, TrainingJob
from learner.workers.step_log import followed
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


def start(job: TrainingJob, settings: WorkerSettings) -> Improvement:
    """Starts them once."""
    if settings.ray:
        from learner.workers.ray_actors import run as run_on_ray

        return run_on_ray(job, settings)
    from learner.workers.torchrun import run

    return run(job, settings.count)
