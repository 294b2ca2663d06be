"""Training by more than one process."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class WorkerSettings(BaseModel):
    """Workers, each of which keeps a share of the policy and samples a share of the answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(
        0,
        ge=0,
        description="Workers that improve the policy together, each with a GPU of its own where the learner computes "
        "on GPUs. 0: the process of the round does.",
    )
    ray: str = Field(
        "",
        description="Address of a Ray cluster that runs the workers, as host:port; empty: this machine does. Every "
        "node must have the data directory at the same path.",
    )
    engines: Literal["inside", "apart"] = Field(
        "inside",
        description="Where each worker's engine is: in the worker, on whose GPU the two take turns; or in a process "
        "apart, with a GPU of its own where the learner computes on GPUs.",
    )
    restarts: int = Field(3, ge=0, description="How often a round starts its workers again after one was killed.")

    @model_validator(mode="after")
    def _ray_has_workers(self) -> Self:
        if self.ray and not self.count:
            raise ValueError("workers.ray needs workers.count")
        if self.engines == "apart" and not self.count:
            raise ValueError("workers.engines = apart needs workers.count")
        return self

    @property
    def gpus_each(self) -> int:
        """GPUs of a worker, where the learner computes on GPUs: the trainer's, and the engine's if it is apart."""
        return 2 if self.engines == "apart" else 1
