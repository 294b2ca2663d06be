"""Two real servers and a learner, each as on a machine of its own, on PostgreSQL and S3."""

from pathlib import Path

import pytest

from clients import Client
from clients.demo.voter import ask
from server.store.files.manifest import verify
from tests.e2e.conftest import live_server
from tests.e2e.small_rounds import small_round
from tests.postgres import PostgresServer
from tests.s3 import s3_server

pytestmark = pytest.mark.e2e


def test_votes_at_two_servers_become_a_policy_that_both_serve(
    tiny_model: Path, tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, url = small_round(str(tiny_model)), postgres.create(migrated=False)
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    with s3_server() as (_, variables):
        for name, value in {**variables, "PREFLOOP_POLICY_URL": "s3://bucket/versions"}.items():
            monkeypatch.setenv(name, value)
        with live_server(tmp_path / "one", tiny_model) as one, live_server(tmp_path / "other", tiny_model) as other:
            with Client(f"{one.address},{other.address}", user="voter") as client:
                small.vote(client)
                report = small.run(tmp_path / "learner")
                assert report["state"] == "promoted", report["sentence"]
                version = report["policy_version"]
                for server in (one, other):
                    server.hear(f"swapped to {version}")
                replicas = client.active_policy().replicas
                assert {replica.loaded_version for replica in replicas} == {version}
                assert len(replicas) == 2
                # A server is lost with its machine. Another takes its calls, and a new one what it served.
                other.kill()
                assert ask(client, "What is a lighthouse for?", max_tokens=8).policy_version == version
            with live_server(tmp_path / "new", tiny_model) as new, Client(new.address, user="voter") as client:
                assert any(f"swapped to {version}" in line for line in new.log)
                assert ask(client, "What is a lighthouse for?", max_tokens=8).policy_version == version
        machines = ("one", "other", "new", "learner")
        kept = [verify(tmp_path / machine / "policies" / version).model_dump_json() for machine in machines]
        assert len(set(kept)) == 1
