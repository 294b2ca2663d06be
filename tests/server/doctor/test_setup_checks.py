"""Checks of a setup, for each kind of problem, on literal readings."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.doctor import setup_checks as checks
from server.doctor.finding import Finding
from server.doctor.needs import Needs
from server.doctor.readings import Disk
from server.shared.machine import GIB
from server.store.sqlite.database import sqlite_problem

NEEDS = Needs(server=4 * GIB, round=5 * GIB, least_round=5 * GIB, version=GIB // 4)
SOUND = Disk(Path("/srv"), "ext4", 50 * GIB, 0.0042)


def test_settings() -> None:
    assert checks.check_settings([], "") == Finding("settings", "ok", "defaults")
    assert checks.check_settings(["prefloop.toml", "2 PREFLOOP_* variables"], "") == Finding(
        "settings", "ok", "prefloop.toml and 2 PREFLOOP_* variables"
    )
    assert checks.check_settings(["prefloop.toml"], "Unknown setting: prot (did you mean port?).") == Finding(
        "settings", "wrong", "prefloop.toml",
        "Unknown setting: prot (did you mean port?). The other checks use the defaults.",
    )  # fmt: skip


def test_packages() -> None:
    assert checks.check_packages([]) == Finding("packages", "ok", "as pinned")
    assert checks.check_packages(["torch 2.12.0, needed ==2.13.0", "peft missing, needed >=0.21"]) == Finding(
        "packages", "wrong", "torch 2.12.0, needed ==2.13.0; peft missing, needed >=0.21",
        "Versions that prefloop was not tested with are installed: `make setup` installs the tested ones.",
    )  # fmt: skip
    assert checks.check_packages(None) == Finding(
        "packages", "warning", "not compared", "prefloop is not installed as a package: `make setup` installs it."
    )


@pytest.mark.parametrize("version", [(3, 51, 3), (3, 53, 4), (4, 0, 0), (3, 50, 7), (3, 50, 9), (3, 44, 6)])
def test_a_sqlite_that_keeps_its_commits(version: tuple[int, int, int]) -> None:
    assert checks.check_sqlite(version).state == "ok"
    assert sqlite_problem(version) is None


@pytest.mark.parametrize("version", [(3, 40, 1), (3, 44, 5), (3, 45, 0), (3, 49, 9), (3, 50, 6), (3, 51, 2)])
def test_a_sqlite_that_can_lose_commits(version: tuple[int, int, int]) -> None:
    number = ".".join(map(str, version))
    assert checks.check_sqlite(version) == Finding(
        "store", "wrong", f"SQLite {number}",
        f"SQLite {number} can lose commits; install pysqlite3 with SQLite 3.51.3 or newer.",
    )  # fmt: skip


def test_model() -> None:
    assert checks.check_model("smollm2", "", True, True) == Finding("model", "ok", "smollm2")
    assert checks.check_model("me/mine", "", False, False) == Finding(
        "model", "warning", "me/mine",
        "me/mine is not on this machine: the first start fetches it from Hugging Face, if it exists there.",
    )  # fmt: skip
    assert checks.check_model("me/mine", "", False, True) == Finding(
        "model", "wrong", "me/mine",
        "--model 'me/mine' is not on this machine, and HF_HUB_OFFLINE forbids fetching it: give --model a directory.",
    )  # fmt: skip
    assert checks.check_model("./x", "--model './x' has no chat template.", True, True) == Finding(
        "model", "wrong", "./x", "--model './x' has no chat template."
    )


def test_disk() -> None:
    assert checks.check_disk(SOUND, NEEDS, 0, 8) == Finding("disk", "ok", "/srv (ext4), 50.0 GiB free, fsync 4.2 ms")
    assert checks.check_disk(SOUND, None, 0, 8).state == "ok"
    # With the store in PostgreSQL, there are files alone.
    assert checks.check_disk(replace(SOUND, filesystem="nfs4"), NEEDS, 0, 8, sqlite=False).state == "ok"


@pytest.mark.parametrize(
    ("changes", "needs", "used", "state", "advice"),
    [
        ({"fsync_seconds": None, "problem": "Read-only file system"}, NEEDS, 0, "wrong",
         "Nothing can be written there (Read-only file system): give --data-dir a folder that you may write to, on a "
         "disk with free space."),
        ({"filesystem": "nfs4"}, NEEDS, 0, "wrong",
         "SQLite's locks cannot be trusted on a network drive: give --data-dir a folder on a local disk."),
        ({"free": GIB // 2 - 1}, NEEDS, 10 * GIB, "wrong",
         "The next version does not fit: free some space, or give --data-dir a folder on another disk."),
        ({"free": GIB - 1}, None, 0, "wrong",
         "The next version does not fit: free some space, or give --data-dir a folder on another disk."),
        # 11 versions of a quarter of a GiB, of which one exists.
        ({"free": 2 * GIB}, NEEDS, GIB // 4, "warning",
         "Stored versions take up to 2.8 GiB, now 0.2: free some space, or lower PREFLOOP_KEEP_VERSIONS."),
        ({"fsync_seconds": 0.2}, NEEDS, 0, "warning",
         "Every vote waits until it is on disk: put --data-dir on a faster one, an SSD for example."),
        ({"filesystem": "tmpfs"}, NEEDS, 0, "warning",
         "The data is lost with the next restart: give --data-dir a folder on a disk."),
    ],
)  # fmt: skip
def test_disk_problems(changes: dict[str, object], needs: Needs | None, used: int, state: str, advice: str) -> None:
    found = checks.check_disk(replace(SOUND, **changes), needs, used, 8)  # type: ignore[arg-type]
    assert (found.state, found.advice) == (state, advice)


def test_existing_versions_need_no_further_space() -> None:
    assert checks.check_disk(replace(SOUND, free=GIB), NEEDS, 2 * GIB, 8).state == "ok"


def test_ports() -> None:
    assert checks.check_port("127.0.0.1", 50051, "", "") == Finding("port", "ok", "127.0.0.1:50051")
    assert checks.check_port("127.0.0.1", 50051, "Address already in use", "") == Finding(
        "port", "wrong", "127.0.0.1:50051",
        "Cannot listen on 127.0.0.1:50051 (Address already in use): choose another --port.",
    )  # fmt: skip
    assert checks.check_port("127.0.0.1", 50051, "Address already in use", "NOT_SERVING") == Finding(
        "port", "ok", "127.0.0.1:50051, where a server is NOT_SERVING"
    )
    assert checks.check_metrics_port("127.0.0.1", 9464, "", "") == Finding("metrics port", "ok", "127.0.0.1:9464")
    assert checks.check_metrics_port("127.0.0.1", 9464, "Address already in use", "") == Finding(
        "metrics port", "warning", "127.0.0.1:9464",
        "Cannot listen on 127.0.0.1:9464 (Address already in use): there will be no metrics; choose another "
        "PREFLOOP_METRICS_PORT.",
    )  # fmt: skip
    assert checks.check_metrics_port("127.0.0.1", 9464, "Address already in use", "SERVING") == Finding(
        "metrics port", "ok", "127.0.0.1:9464, where a server is SERVING"
    )
