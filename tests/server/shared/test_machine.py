"""The resources that a process may use, from files as on Linux, and the reasons for slow rounds."""

import os
from pathlib import Path

import pytest

from server.shared.machine import GIB, Machine, read_machine, slow_reason

MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The machine with four cores and 16 GiB, in the group `own` and with these cgroup files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5})

    def machine(own: str, files: dict[str, str]) -> Machine:
        write(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": own})
        write(tmp_path / "cgroups", files)
        return read_machine(tmp_path / "proc", tmp_path / "cgroups")

    return machine


def test_a_machine_without_limits(read) -> None:  # type: ignore[no-untyped-def]
    assert read("0::/\n", {}) == Machine(frozenset({0, 1, 2, 5}), 4.0, 16 * GIB, 8 * GIB)


def test_a_container_has_less_than_its_machine(read) -> None:  # type: ignore[no-untyped-def]
    machine = read("0::/\n", {"memory.max": f"{4 * GIB}\n", "cpu.max": "150000 100000\n"})
    assert machine == Machine(frozenset({0, 1, 2, 5}), 1.5, 4 * GIB, 4 * GIB)


def test_the_tightest_limit_up_to_the_root_counts(read) -> None:  # type: ignore[no-untyped-def]
    files = {
        "system.slice/memory.max": f"{6 * GIB}\n",
        "system.slice/prefloop.service/memory.max": f"{12 * GIB}\n",
        "system.slice/prefloop.service/cpu.max": "max 100000\n",
        "system.slice/cpu.max": "300000 100000\n",
        "other.slice/memory.max": f"{1 * GIB}\n",
    }
    machine = read("0::/system.slice/prefloop.service\n", files)
    assert (machine.cores, machine.memory) == (3.0, 6 * GIB)


def test_cgroups_v1(read) -> None:  # type: ignore[no-untyped-def]
    files = {
        "memory/docker/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cpu/docker/cpu.cfs_quota_us": "50000\n",
        "cpu/docker/cpu.cfs_period_us": "100000\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
    }
    machine = read("4:memory:/docker\n2:cpu,cpuacct:/docker\n0::/\n", files)
    assert (machine.cores, machine.memory, machine.available) == (0.5, 2 * GIB, 2 * GIB)


def test_a_container_sees_its_own_group_as_the_root(read) -> None:  # type: ignore[no-untyped-def]
    # cgroup v1 without a namespace: the path is the host's, but the container's own folder is mounted.
    assert read("4:memory:/docker/123\n", {"memory/memory.limit_in_bytes": f"{3 * GIB}\n"}).memory == 3 * GIB


def test_the_reason_for_slow_rounds() -> None:
    assert slow_reason(Machine(frozenset({0, 1}), 2.0, 8 * GIB, 0)) is None
    assert slow_reason(Machine(frozenset({0}), 1.0, 64 * GIB, 0)) == (
        "prefloop has 1 of the 2 cores that it is designed for: answers and rounds take at least twice as long."
    )
    assert slow_reason(Machine(frozenset({0, 1, 2, 3}), 1.5, 64 * GIB, 0)) == (
        "prefloop has 1.5 of the 2 cores that it is designed for: answers and rounds take at least twice as long."
    )
    assert slow_reason(Machine(frozenset({0, 1}), 2.0, 4 * GIB, 0)) == (
        "prefloop has 4.0 GiB of memory, but the server and a round need about 8.0: a round may be slow, or be killed."
    )
    assert slow_reason(Machine(frozenset({0, 1}), 2.0, 12 * GIB, 0), needed=13 * GIB) == (
        "prefloop has 12.0 GiB of memory, but the server and a round need about 13.0: a round may be slow, or be "
        "killed."
    )
