"""The README's setup for other users: a key, a certificate, an open address, and `chat` with key and certificate."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import live_server
from tests.pem import make_pem

pytestmark = pytest.mark.e2e


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_who_has_a_key_gets_in_and_nobody_else(model: str, tmp_path: Path) -> None:
    own, data_dir = make_pem(tmp_path, "own"), tmp_path / "data"
    key = run("server.cli", "keys", "create", "--user", "olga", "--data-dir", str(data_dir)).stdout.strip()
    tls = {"PREFLOOP_TLS_CERT": str(own.certificate), "PREFLOOP_TLS_KEY": str(own.key), "PREFLOOP_HOST": "0.0.0.0"}
    with live_server(data_dir, model, **tls) as server:
        port = server.address.rpartition(":")[2]
        send = ["clients.cli", "send", "Hello.", "--max-tokens", "4", "--host", "localhost", "--port", port]
        send += ["--ca", str(own.certificate)]
        answer = run(*send, PREFLOOP_API_KEY=key)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert answer.stdout.strip()
        refused = run(*send, PREFLOOP_API_KEY=key[:-1] + ("A" if key[-1] != "A" else "B"))
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == "chat: This API key is unknown or was revoked.\n"
        assert "Send an API key" in run(*send).stderr
        listed = run("server.cli", "keys", "list", "--data-dir", str(data_dir)).stdout
        assert "user         olga" in listed
        assert run("server.cli", "keys", "revoke", key.partition(".")[0], "--data-dir", str(data_dir)).returncode == 0
        assert "unknown or was revoked" in run(*send, PREFLOOP_API_KEY=key).stderr
        # A killed server does not leave its engine behind.
        for process in server.kill():
            assert select.select([process], [], [], 20)[0]
            os.close(process)
