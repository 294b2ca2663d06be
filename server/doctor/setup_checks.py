"""Checks of the installation and configuration. Each judges readings, and reads nothing itself."""

from server.doctor.finding import Finding, State
from server.doctor.needs import Needs
from server.doctor.readings import Disk
from server.reference.model_hub import OFFLINE
from server.shared.machine import GIB
from server.store.sqlite.database import sqlite_problem

# Beyond this, a vote no longer seems instant.
SLOW_FSYNC_SECONDS = 0.05
# SQLite's locks cannot be trusted on these.
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.glusterfs", "afs", "virtiofs"}
IN_MEMORY = {"tmpfs", "ramfs"}
# Beside `keep_versions`: the reference, the active version and the one before it.
ALWAYS_KEPT = 3


def check_settings(sources: list[str], problem: str) -> Finding:
    value = " and ".join(sources) or "defaults"
    if problem:
        advice = f"{problem} The other checks use the defaults."
        return Finding("settings", "wrong", value, advice)
    return Finding("settings", "ok", value)


def check_packages(unmet: list[str] | None) -> Finding:
    if unmet is None:
        return Finding(
            "packages", "warning", "not compared", "prefloop is not installed as a package: `make setup` installs it."
        )
    if unmet:
        advice = "Versions that prefloop was not tested with are installed: `make setup` installs the tested ones."
        return Finding("packages", "wrong", "; ".join(unmet), advice)
    return Finding("packages", "ok", "as pinned")


def check_sqlite(version: tuple[int, int, int]) -> Finding:
    value = f"SQLite {'.'.join(map(str, version))}"
    if reason := sqlite_problem(version):
        return Finding("store", "wrong", value, reason)
    return Finding("store", "ok", value)


def check_model(value: str, problem: str, fetched: bool, offline: bool) -> Finding:
    """`fetched`: whether its files are on this machine."""
    if problem:
        return Finding("model", "wrong", value, problem)
    if not fetched and offline:
        advice = f"--model {value!r} {OFFLINE}"
        return Finding("model", "wrong", value, advice)
    if not fetched:
        advice = f"{value} is not on this machine: the first start fetches it from Hugging Face, if it exists there."
        return Finding("model", "warning", value, advice)
    return Finding("model", "ok", value)


def check_disk(disk: Disk, needs: Needs | None, used: int, keep_versions: int, *, sqlite: bool = True) -> Finding:
    """`used`: bytes of the existing versions. `sqlite`: whether the store is there, too."""
    value = f"{disk.directory} ({disk.filesystem}), {disk.free / GIB:.1f} GiB free"
    if disk.fsync_seconds is None:
        advice = (
            f"Nothing can be written there ({disk.problem}): give --data-dir a folder that you may write to, on a disk "
            "with free space."
        )
        return Finding("disk", "wrong", value, advice)
    value += f", fsync {disk.fsync_seconds * 1000:.1f} ms"
    if sqlite and disk.filesystem in NETWORK:
        advice = "SQLite's locks cannot be trusted on a network drive: give --data-dir a folder on a local disk."
        return Finding("disk", "wrong", value, advice)
    if disk.free < (2 * needs.version if needs else GIB):
        advice = "The next version does not fit: free some space, or give --data-dir a folder on another disk."
        return Finding("disk", "wrong", value, advice)
    if needs and disk.free + used < (wanted := (ALWAYS_KEPT + keep_versions) * needs.version):
        advice = (
            f"Stored versions take up to {wanted / GIB:.1f} GiB, now {used / GIB:.1f}: free some space, or lower "
            "PREFLOOP_KEEP_VERSIONS."
        )
        return Finding("disk", "warning", value, advice)
    if disk.fsync_seconds > SLOW_FSYNC_SECONDS:
        advice = "Every vote waits until it is on disk: put --data-dir on a faster one, an SSD for example."
        return Finding("disk", "warning", value, advice)
    if disk.filesystem in IN_MEMORY:
        advice = "The data is lost with the next restart: give --data-dir a folder on a disk."
        return Finding("disk", "warning", value, advice)
    return Finding("disk", "ok", value)


def check_port(host: str, port: int, problem: str, health: str) -> Finding:
    """The port for chats. `health` is not empty if a prefloop server already answers here."""
    return _check_port("port", "wrong", f"{host}:{port}", problem, health, "choose another --port")


def check_metrics_port(host: str, port: int, problem: str, health: str) -> Finding:
    """The port for metrics, without which the server still runs."""
    advice = "there will be no metrics; choose another PREFLOOP_METRICS_PORT"
    return _check_port("metrics port", "warning", f"{host}:{port}", problem, health, advice)


def _check_port(name: str, state: State, address: str, problem: str, health: str, advice: str) -> Finding:
    if problem and health:
        return Finding(name, "ok", f"{address}, where a server is {health}")
    if problem:
        return Finding(name, state, address, f"Cannot listen on {address} ({problem}): {advice}.")
    return Finding(name, "ok", address)
