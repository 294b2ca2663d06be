"""The cores and memory that a process may use on this machine, within the limits of a container or service unit.

Limits are read from cgroups v1 and v2; the tightest one up to the root counts. Does not import torch.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# What a server and a concurrent round need with the default model (docs/operations.md).
COMFORTABLE_MEMORY = 8 * GIB
COMFORTABLE_CORES = 2


@dataclass(frozen=True)
class Machine:
    """`cpus` are the numbers of the cores that a thread may run on; `cores` is the CPU time in cores: less, and perhaps
    a fraction, under a quota. Memory is in bytes, `available` is free now."""

    cpus: frozenset[int]
    cores: float
    memory: int
    available: int


def read_machine(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Machine:
    """The machine's resources available to this process."""
    cpus = frozenset(os.sched_getaffinity(0))
    cores = min([float(len(cpus)), *_quotas(proc, cgroups)])
    total, available = _meminfo(proc)
    memory = min([total, *_memory_limits(proc, cgroups)])
    return Machine(cpus, cores, memory, min(available, memory))


def slow_reason(machine: Machine, needed: int = COMFORTABLE_MEMORY) -> str | None:
    """Why a round takes long on this machine, as a sentence; None if it has what a round needs."""
    if machine.cores < COMFORTABLE_CORES:
        return (
            f"prefloop has {machine.cores:.2g} of the {COMFORTABLE_CORES} cores that it is designed for: answers and "
            "rounds take at least twice as long."
        )
    if machine.memory < needed:
        return (
            f"prefloop has {machine.memory / GIB:.1f} GiB of memory, but the server and a round need about "
            f"{needed / GIB:.1f}: a round may be slow, or be killed."
        )
    return None


def _meminfo(proc: Path) -> tuple[int, int]:
    """Total and available memory in bytes."""
    kib = {}
    for line in (proc / "meminfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        kib[name] = value.split()[0]
    return int(kib["MemTotal"]) * 1024, int(kib["MemAvailable"]) * 1024


def _quotas(proc: Path, cgroups: Path) -> Iterator[float]:
    """Each quota of CPU time, in cores."""
    for folder in _groups(proc, cgroups, "cpu"):
        for text in _texts(folder / "cpu.max"):
            quota, period = text.split()
            if quota != "max":
                yield int(quota) / int(period)
        for quota, period in zip(
            _texts(folder / "cpu.cfs_quota_us"), _texts(folder / "cpu.cfs_period_us"), strict=False
        ):
            if int(quota) > 0:
                yield int(quota) / int(period)


def _memory_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    for folder in _groups(proc, cgroups, "memory"):
        # cgroup v1 has a number beyond any memory if there is no limit.
        for name in ("memory.max", "memory.limit_in_bytes"):
            yield from (int(text) for text in _texts(folder / name) if text != "max")


def _groups(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups, from its own to the root."""
    for line in _texts(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        # A line without controllers is from cgroup v2, which has one tree for all.
        if not controllers or controller in controllers.split(","):
            root = cgroups / controller if controllers else cgroups
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _texts(path: Path) -> list[str]:
    """The file's lines; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
