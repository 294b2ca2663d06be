"""PgBouncer in front of a server: it lends two connections, by the transaction, and forgets what a session set."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.pem import Pem
from tests.ports import free_port, wait_until_open
from tests.postgres import PostgresServer, database_of, unprivileged

SECONDS = 30


@dataclass
class Pooler:
    """A running pooler."""

    port: int

    def url(self, url: str, host: str = "127.0.0.1") -> str:
        """The address of the same database, through the pooler."""
        return f"postgresql://postgres@{host}:{self.port}/{database_of(url)}"


@contextmanager
def pooler(server: PostgresServer, pem: Pem | None = None) -> Iterator[Pooler]:
    """A pooler on a port of loopback, with TLS if there is a certificate; skips if PgBouncer is not installed."""
    pgbouncer = shutil.which("pgbouncer")
    if pgbouncer is None:
        pytest.skip("pgbouncer is not installed")
    port = free_port()
    folder = server.folder / f"pooler-{port}"
    folder.mkdir()
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": 2,
        "server_reset_query": "DISCARD ALL",
        "server_reset_query_always": 1,
        "ignore_startup_parameters": "extra_float_digits",
    }
    if pem:
        for name, file in {"client_tls_cert_file": pem.certificate, "client_tls_key_file": pem.key}.items():
            settings[name] = shutil.copy(file, folder / file.name)
        settings["client_tls_sslmode"] = "require"
    databases = f"[databases]\n* = host={server.folder} port={server.port} user=postgres\n"
    lines = [f"{name} = {value}" for name, value in settings.items()]
    (folder / "ini").write_text(databases + "\n".join(["[pgbouncer]", *lines]))
    who = unprivileged()
    for path in (folder, *folder.iterdir()) if who else ():
        shutil.chown(path, who["user"], who["group"])
    process = subprocess.Popen([pgbouncer, "-q", str(folder / "ini")], **who)
    try:
        wait_until_open(port, process)
        yield Pooler(port)
    finally:
        process.kill()
        process.wait(SECONDS)
        shutil.rmtree(folder)
