"""Starts workers as actors of a Ray cluster, on any of its nodes."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from learner.model.device import resolve_device
from learner.worker_settings import WorkerSettings
from learner.workers.job import KilledError, TrainingJob
from server.shared.errors import FailedPreconditionError
from server.store.learning.round_metrics import Improvement

# How long the cluster may take to find room for all workers.
START_SECONDS = 300.0
# How long it may take until the cluster knows that a worker was killed.
NOTICE_SECONDS = 30.0
TOKEN_FILE = Path(".ray") / "auth_token"


class Worker:
    """An actor: one worker in a process of its own."""

    def place(self) -> tuple[str, int]:
        """Its node's address, and a free port there."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def train(self, job: TrainingJob, environment: dict[str, str]) -> Improvement:
        """See `learner.workers.worker.train`."""
        os.environ.update(environment)
        from learner.workers.worker import train

        return train(job)


def run(job: TrainingJob, settings: WorkerSettings) -> Improvement:
    """Trains by workers on the cluster. Raises KilledError if one was killed or its node was lost, RuntimeError if one
    failed, and FailedPreconditionError if the cluster cannot be used."""
    import ray

    needs = needs_of_a_worker(settings, job.settings.learner_device)
    with connected(settings):
        reserved = {f"num_{name.lower()}s": count for name, count in needs.items()}
        actor = ray.remote(Worker).options(scheduling_strategy="SPREAD", max_restarts=0, **reserved)
        actors = [actor.remote() for _ in range(settings.count)]
        try:
            places = ray.get([each.place.remote() for each in actors], timeout=START_SECONDS)
            told = zip(actors, environments(places), strict=True)
            return results([each.train.remote(job, environment) for each, environment in told])[0]
        except ray.exceptions.GetTimeoutError:
            raise FailedPreconditionError(
                "RAY_RESOURCES", f"The Ray cluster had no room for the workers for {START_SECONDS:.0f} s."
            ) from None
        finally:
            for each in actors:
                ray.kill(each)


def check_cluster(settings: WorkerSettings, learner_device: str) -> None:
    """Raises FailedPreconditionError if there is no cluster that has what the workers need."""
    import ray

    needs = needs_of_a_worker(settings, learner_device)
    with connected(settings):
        has = ray.cluster_resources()
    for name, count in needs.items():
        if has.get(name, 0) < count * settings.count:
            raise FailedPreconditionError(
                "RAY_RESOURCES",
                f"The Ray cluster at {settings.ray} has {has.get(name, 0):.0f} {name}: {settings.count} workers need "
                f"{count * settings.count}. Set PREFLOOP_WORKERS__COUNT, or add nodes.",
            )


def needs_of_a_worker(settings: WorkerSettings, learner_device: str) -> dict[str, int]:
    """What Ray reserves for each: its GPUs if this machine's learner uses one, else a core."""
    return {"GPU": settings.gpus_each} if resolve_device(learner_device).type == "cuda" else {"CPU": 1}


@contextmanager
def connected(settings: WorkerSettings) -> Iterator[None]:
    """A connection to the cluster."""
    require_token()
    import ray

    try:
        ray.init(settings.ray, log_to_driver=False, configure_logging=False)
    # It is the latter where this machine is no node of the cluster.
    except (ConnectionError, RuntimeError) as error:
        raise FailedPreconditionError(
            "RAY_UNREACHABLE",
            f"There is no Ray cluster at {settings.ray} of which this machine is a node and that accepts this token: "
            f"{error}",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def environments(places: list[tuple[str, int]]) -> list[dict[str, str]]:
    """What torchrun would set for workers at these places, the first of which leads."""
    host, port = places[0]
    nodes = [node for node, _ in places]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_WORLD_SIZE": str(nodes.count(node)),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        for rank, node in enumerate(nodes)
    ]


def results(trainings: list[Any]) -> list[Improvement]:
    """What all return; the first failure ends the wait for the others."""
    import ray

    waiting = list(trainings)
    while waiting:
        [ended], waiting = ray.wait(waiting, num_returns=1)
        if failure := failed(ended, trainings):
            # Workers whose peer was killed fail before the cluster knows why.
            others, _ = ray.wait(waiting, num_returns=len(waiting), timeout=NOTICE_SECONDS) if waiting else ([], [])
            failures = [failure, *filter(None, (failed(other, trainings) for other in others))]
            raise next((each for each in failures if isinstance(each, KilledError)), failure)
    found: list[Improvement] = ray.get(trainings)
    return found


def failed(training: Any, trainings: list[Any]) -> RuntimeError | None:
    """Why a training that has ended gave no result; None if it did."""
    import ray

    rank = trainings.index(training)
    try:
        ray.get(training)
    except ray.exceptions.RayActorError:
        return KilledError(f"Worker {rank} was killed, or its node was lost.")
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, KilledError) else RuntimeError(f"Worker {rank} failed: {cause}")
    return None


def require_token() -> None:
    """Raises FailedPreconditionError if Ray would not authenticate by a token (`learner.process.set_environment`), or
    has none."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise FailedPreconditionError("RAY_TOKEN", "RAY_AUTH_MODE must be token: remove the variable, or set it so.")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / TOKEN_FILE)
    if not os.environ.get("RAY_AUTH_TOKEN") and not file.is_file():
        raise FailedPreconditionError(
            "RAY_TOKEN",
            "There is no token for the Ray cluster: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the one that its "
            "nodes were started with (`ray get-auth-token --generate` makes one).",
        )
