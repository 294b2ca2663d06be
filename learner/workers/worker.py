"""What each worker does: it trains a policy together with the others, by torch.distributed alone.

Whoever starts workers sets RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun does.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from learner.improve.base import ExperienceSource, SamplingEngine, Task
from learner.improve.improvers import make_improver
from learner.model.device import resolve_device
from learner.model.policy import TrainablePolicy
from learner.model.rollout import RolloutEngine
from learner.model.worker_group import WorkerGroup
from learner.process import give_way, keep_freed_memory, set_environment
from learner.reward.linear_reward_model import LinearRewardModel
from learner.settings import LearnerSettings
from learner.workers.apart import EngineProcess
from learner.workers.job import TrainingJob
from learner.workers.step_log import StepLog
from server.shared.machine import read_machine
from server.shared.model.dtype import torch_dtype
from server.store.learning.round_metrics import Improvement, StepMetrics

# How long a worker waits for the others, which may be sampling, before it gives up.
PATIENCE = timedelta(minutes=30)


def train(job: TrainingJob) -> Improvement:
    """Improves the policy; candidates, states and the log of steps are in the job's directory. What a killed call left
    there is continued, with any number of workers."""
    settings = job.settings
    if not job.directory.is_dir():
        raise RuntimeError(f"{socket.gethostname()} has no {job.directory}: mount the data directory there, too.")
    engine_gpu = prepare(settings)
    with worker_group() as group, closing(make_engine(job, engine_gpu)) as engine:
        policy = sharded_policy(job, group)
        source = ExperienceSource(engine, job.prompts, settings.service_temperature, settings.seed)
        reward_model = LinearRewardModel.load(job.reward_model)
        on_step = StepLog(job.directory).write if group.leads else ignore
        task = Task(policy, source, reward_model, job.budget, job.directory, on_step)
        return make_improver(settings, job.votes).improve(task)


def prepare(settings: LearnerSettings) -> str | None:
    """Sets up the process, which has a share of its machine's cores. Of two GPUs that it sees it keeps the first;
    returns the other one, for its engine."""
    own, _, other = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")
    if other:
        os.environ["CUDA_VISIBLE_DEVICES"] = own
    set_environment(settings)
    keep_freed_memory()
    of_each = int(read_machine().cores) // int(os.environ["LOCAL_WORLD_SIZE"])
    give_way(settings.nice, settings.threads or max(1, of_each))
    return other or None


def make_engine(job: TrainingJob, gpu: str | None) -> SamplingEngine:
    """The worker's engine, in this process or apart."""
    arguments = job.reference, job.settings, job.dtype, job.longest
    if job.settings.workers.engines == "inside":
        return RolloutEngine(*arguments)
    return EngineProcess(*arguments, visible_gpu=gpu, make=RolloutEngine)


@contextmanager
def worker_group() -> Iterator[WorkerGroup]:
    """This worker in its group."""
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    yield WorkerGroup(distributed.get_rank(), distributed.get_world_size())
    # vLLM may have ended it with its engine.
    if distributed.is_initialized():
        distributed.destroy_process_group()


def sharded_policy(job: TrainingJob, group: WorkerGroup) -> TrainablePolicy:
    """The policy as the round starts with it. It is read on the CPU, and goes layer by layer to where it computes."""
    settings = job.settings
    policy = TrainablePolicy.create(
        job.reference,
        settings.policy,
        torch_dtype(job.dtype),
        torch.device("cpu"),
        settings.seed,
        settings.trust_remote_code,
    )
    if job.start:
        policy.load(job.start)
    policy.shard(group, init_device_mesh(resolve_device(settings.learner_device).type, (group.count,)))
    return policy


def ignore(_: StepMetrics) -> None:
    """For workers that do not lead."""
