"""Starts workers on this machine, by torchrun's own launcher."""

import os
import signal

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from learner.process import end_with_parent, show_gpus
from learner.workers.job import KilledError, TrainingJob
from server.store.learning.round_metrics import Improvement


def run(job: TrainingJob, count: int) -> Improvement:
    """Trains by `count` workers. Raises KilledError if one was killed, and RuntimeError if one failed."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=job.directory.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle="SIGTERM",
    )
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        results: dict[int, Improvement] = elastic_launch(config, worker)(job)
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise KilledError(f"Worker {rank} was killed ({signal.Signals(-failure.exitcode).name}).") from None
        raise RuntimeError(f"Worker {rank} failed: {failure.message}") from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    return results[0]


@record
def worker(job: TrainingJob) -> Improvement:
    """What runs in each process. It ends with the process that started it, whatever ends that."""
    end_with_parent()
    if job.settings.learner_device == "cuda":
        show_gpus(int(os.environ["LOCAL_RANK"]), job.settings.workers.gpus_each)
        # By it torch would choose among the GPUs that are visible: the first is this worker's.
        os.environ["LOCAL_RANK"] = "0"
    from learner.workers.worker import train

    try:
        return train(job)
    except KilledError:
        # What ends its engine apart ends a worker in the same way.
        os.kill(os.getpid(), signal.SIGKILL)
        raise
