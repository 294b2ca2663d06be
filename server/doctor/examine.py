"""Runs all checks of `server doctor`, and collects measurements for programs."""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from server.doctor import machine_checks, readings, setup_checks
from server.doctor.finding import Finding, State
from server.doctor.model import Model, read_model
from server.doctor.needs import Needs, needs_of
from server.doctor.readings import Torch
from server.doctor.speed import Speed, measure
from server.engine.weights import MERGED
from server.settings import ServerSettings
from server.shared.errors import DataDirectoryError, ServiceError
from server.shared.machine import GIB, Machine, read_machine, slow_reason
from server.shared.model.dtype import MICRO_BATCH_TOKENS
from server.shared.model.needs import Training
from server.shared.settings_base import CONFIG_FILE, explain
from server.shared.stored_round import ANSWER_TOKENS
from server.shared.variables import PREFIX
from server.store.sqlite.database import sqlite_version
from server.store.store import Store

# The most memory that measuring the speed takes, with room for torch itself.
MEASURE_BYTES = GIB


class LearnerShare(BaseModel):
    """The learner's policy settings that determine its memory."""

    train: Literal["lora", "full"] = "lora"
    lora_rank: Annotated[int, Field(ge=1)] = 16
    micro_batch_tokens: Annotated[int, Field(ge=0)] = 0
    checkpoint_activations: Literal["auto", "on", "off"] = "auto"


class RolloutShare(BaseModel):
    """The setting that determines how many answers a round has at once."""

    episodes: Annotated[int, Field(ge=2)] = 32


class DoctorSettings(ServerSettings):
    """The server's settings, and those of the learner that determine disk and memory, a GPU's too."""

    renamed: ClassVar = {
        **ServerSettings.renamed,
        "ppo.micro_batch": "policy.micro_batch_tokens",
        "ppo.micro_batch_tokens": "policy.micro_batch_tokens",
    }
    rescaled: ClassVar = {"ppo.micro_batch": ANSWER_TOKENS}

    keep_versions: Annotated[int, Field(ge=1)] = 8
    learner_device: str = "auto"
    learner_gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.3
    policy: LearnerShare = LearnerShare()
    improver: Literal["ppo", "rloo", "dpo"] = "ppo"
    ppo: RolloutShare = RolloutShare()
    rloo: RolloutShare = RolloutShare()
    dpo: RolloutShare = RolloutShare()


@dataclass(frozen=True)
class Report:
    """All findings, and measurements by name."""

    findings: list[Finding]
    figures: dict[str, Any]

    @property
    def state(self) -> State:
        """The worst state of the findings."""
        return max((finding.state for finding in self.findings), key=["ok", "warning", "wrong"].index)


def examine(**flags: Any) -> Report:
    """Run all checks; takes some seconds, most of them to import torch. Flags that are None are ignored."""
    return Examination(*load_settings(**flags)).report()


def load_settings(**flags: Any) -> tuple[DoctorSettings, str]:
    """The settings and an empty string, or the defaults and a sentence about what is wrong with the settings."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return DoctorSettings(**given), ""
    except (ServiceError, ValueError, OSError) as error:
        return DoctorSettings.model_construct(**given), explain(error)


class Examination:
    """All checks on some settings. Readings are taken once, when a check first needs them."""

    def __init__(self, settings: DoctorSettings, settings_problem: str) -> None:
        self.settings, self.settings_problem = settings, settings_problem

    def report(self) -> Report:
        return Report([attempt(name, check) for name, check in self.checks()], self.figures())

    def checks(self) -> Iterator[tuple[str, Callable[[], Finding]]]:
        """Yield the checks by name, in the order of the table."""
        yield "python", lambda: machine_checks.check_python(sys.version_info[:3])
        yield "system", lambda: machine_checks.check_system(platform.system(), platform.machine())
        yield "system packages", self.check_system_packages
        yield "packages", lambda: setup_checks.check_packages(readings.unmet_requirements())
        yield "settings", self.check_settings
        yield "cores", lambda: machine_checks.check_cores(self.machine, self.settings.cpu_threads)
        yield "arithmetic", lambda: machine_checks.check_arithmetic(self.torch)
        yield "gpu", self.check_gpu
        yield "model", self.check_model
        yield "memory", lambda: machine_checks.check_memory(self.machine, self.needs, bool(self.health))
        yield "speed", lambda: machine_checks.check_speed(*self.speed)
        yield "disk", self.check_disk
        yield "store", self.check_store
        yield "port", lambda: self.check_port(setup_checks.check_port, self.settings.host, self.settings.port)
        host, port = self.settings.metrics_host, self.settings.metrics_port
        yield "metrics port", lambda: self.check_port(setup_checks.check_metrics_port, host, port)

    def check_system_packages(self) -> Finding:
        return machine_checks.check_system_packages(readings.missing_system_packages())

    def check_settings(self) -> Finding:
        variables = sum(name.upper().startswith(PREFIX) for name in os.environ)
        sources = [CONFIG_FILE] if Path(CONFIG_FILE).exists() else []
        sources += [f"{variables} {PREFIX}* variables"] if variables else []
        return setup_checks.check_settings(sources, self.settings_problem)

    def check_store(self) -> Finding:
        url = self.settings.store_url.get_secret_value()
        if not url:
            return setup_checks.check_sqlite(sqlite_version())
        try:
            return Finding("store", "ok", Store.describe_server(url))
        except DataDirectoryError as error:
            return Finding("store", "wrong", "PostgreSQL", str(error))

    def check_gpu(self) -> Finding:
        # Without a number, the learner's engine is on the same GPU as the server's.
        other = self.settings.learner_device.partition(":")[2] not in ("", "0")
        server, learner = self.settings.server_gpu_memory_share, self.settings.learner_gpu_memory_share
        gpus, builds, cuda = readings.read_gpus(), self.builds, self.torch.cuda
        return machine_checks.check_gpu(gpus, builds, cuda, server, 0.0 if other else learner)

    def check_model(self) -> Finding:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        return setup_checks.check_model(self.settings.model, self.model.problem, self.model.fetched, HF_HUB_OFFLINE)

    def check_disk(self) -> Finding:
        data_dir = self.settings.data_dir
        used = sum(readings.bytes_below(data_dir / folder) for folder in ("policies", MERGED))
        sqlite = not self.settings.store_url.get_secret_value()
        disk, keep = readings.read_disk(data_dir), self.settings.keep_versions
        return setup_checks.check_disk(disk, self.needs, used, keep, sqlite=sqlite)

    def check_port(self, check: Callable[[str, int, str, str], Finding], host: str, port: int) -> Finding:
        return check(host, port, readings.port_problem(host, port), self.health)

    def figures(self) -> dict[str, Any]:
        """Measurements for programs that wait on this machine, to explain why it takes long."""
        return {
            "cores": or_none(lambda: self.machine.cores),
            "memory_bytes": or_none(lambda: self.machine.memory),
            "memory_available_bytes": or_none(lambda: self.machine.available),
            "dtype": or_none(lambda: self.torch.dtype and self.torch.dtype.name),
            "dtype_reason": or_none(lambda: self.torch.dtype and self.torch.dtype.reason),
            "tokens_per_second": or_none(lambda: self.speed[0] and asdict(self.speed[0])),
            "needed_bytes": or_none(lambda: self.needs and asdict(self.needs)),
            "slow_reason": or_none(self.slow_reason),
        }

    def slow_reason(self) -> str | None:
        return slow_reason(self.machine, *([self.needs.server + self.needs.least_round] if self.needs else []))

    @cached_property
    def machine(self) -> Machine:
        return read_machine()

    @cached_property
    def torch(self) -> Torch:
        return readings.read_torch(self.settings.dtype)

    @cached_property
    def builds(self) -> list[str]:
        return readings.read_builds()

    @cached_property
    def model(self) -> Model:
        settings, dtype = self.settings, self.torch.dtype
        return read_model(
            settings.data_dir, settings.model, settings.trust_remote_code, dtype.name if dtype else "bfloat16"
        )

    @cached_property
    def health(self) -> str:
        return readings.server_health(self.settings.metrics_host, self.settings.metrics_port)

    @property
    def on_gpu(self) -> bool:
        return self.torch.cuda and "vllm" in self.builds

    @cached_property
    def needs(self) -> Needs | None:
        """None if the model's shape is unknown, or it uses a GPU's memory."""
        settings, shape, dtype = self.settings, self.model.shape, self.torch.dtype
        if self.on_gpu or not shape or not dtype:
            return None
        policy, longest = settings.policy, settings.max_tokens
        training = Training(
            policy.train,
            policy.lora_rank,
            tokens=max(policy.micro_batch_tokens or MICRO_BATCH_TOKENS[dtype.name], longest),
            rollout_tokens=getattr(settings, settings.improver).episodes * longest,
            checkpoint=False,
        )
        return needs_of(shape, dtype.name, settings.kv_cache_gib, training, policy.checkpoint_activations)

    @cached_property
    def speed(self) -> tuple[Speed | None, str]:
        """The speed, or None and the reason why it cannot be estimated."""
        shape, dtype = self.model.shape, self.torch.dtype
        if self.on_gpu:
            return None, "no GPU has been measured yet"
        if not dtype:
            return None, "torch cannot be imported"
        if not shape:
            return None, "the model's files are missing, or not safetensors"
        if self.machine.available < MEASURE_BYTES:
            return None, "too little memory is free"
        return measure(shape, dtype.name, max(1, int(self.machine.cores))), ""


def or_none(read: Callable[[], Any]) -> Any:
    """A measurement, or None if it cannot be read; a finding then says so."""
    try:
        return read()
    except Exception:
        return None


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """The check's finding. On a broken machine a reading may fail unexpectedly; the other checks continue."""
    try:
        return check()
    except Exception as error:
        return Finding(name, "wrong", "cannot be read", f"{type(error).__name__}: {error}")
