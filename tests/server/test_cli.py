"""`server serve` when it cannot start: one sentence of advice, no traceback, no partial files."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server.admin import forget_user
from server.rpc import interceptor
from server.store.sqlite.database import SqliteDatabase
from server.store.store import Store
from tests.learner.conftest import save_tiny_model
from tests.server.reference.test_model_checks import AUTO_MAP, CODE, change
from tests.server.store.test_deletion import thumb, trained
from tests.server.store.test_lineage import lease


def serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def keys(*arguments: str, data_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", "keys", *arguments, "--data-dir", str(data_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def server(*arguments: str, data_dir: Path, answer: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", *arguments, "--data-dir", str(data_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, input=answer)


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = sentence(serve("--data-dir", str(tmp_path), "--port", str(port)))
    assert said == (
        f"server: Cannot listen on 127.0.0.1:{port}; another server may be using it. Choose another --port."
    )
    assert not (tmp_path / "policies").exists()


def test_an_address_that_other_machines_can_reach(tmp_path: Path) -> None:
    said = sentence(serve("--data-dir", str(tmp_path), "--host", "0.0.0.0"))
    assert said == (
        "server: --host 0.0.0.0 accepts connections from other machines, which requires TLS and keys. Missing: a "
        "certificate with PREFLOOP_TLS_CERT and PREFLOOP_TLS_KEY and a key, created with `server keys create --user "
        "NAME --role operator`. Or listen on 127.0.0.1."
    )
    assert not (tmp_path / "policies").exists()


def test_a_public_address_with_only_a_key_or_only_tls(tmp_path: Path) -> None:
    assert keys("create", "--user", "ann", data_dir=tmp_path).returncode == 0
    said = sentence(serve("--data-dir", str(tmp_path), "--host", "0.0.0.0"))
    assert "Missing: a certificate with PREFLOOP_TLS_CERT and PREFLOOP_TLS_KEY. Or" in said
    files = {"PREFLOOP_TLS_CERT": str(tmp_path / "a"), "PREFLOOP_TLS_KEY": str(tmp_path / "b")}
    assert "Missing: a key" in sentence(serve("--data-dir", str(tmp_path / "other"), "--host", "0.0.0.0", **files))
    assert "tls_cert and tls_key must be set together" in sentence(serve(PREFLOOP_TLS_KEY="b"))


def test_keys_are_created_listed_and_revoked(tmp_path: Path) -> None:
    made = keys("create", "--user", "ann", "--role", "operator", data_dir=tmp_path).stdout.strip()
    key_id, _, secret = made.partition(".")
    assert re.fullmatch(r"key_[0-9a-f]{24}", key_id)
    assert re.fullmatch(r"[\w-]{43}", secret)
    listed = keys("list", data_dir=tmp_path).stdout
    assert listed.startswith(f"{key_id}  operator     ann ")
    assert "revoked" not in listed
    assert secret not in listed
    assert secret.encode() not in (tmp_path / "prefloop.db").read_bytes()
    assert keys("revoke", key_id, data_dir=tmp_path).returncode == 0
    assert "revoked 20" in keys("list", data_dir=tmp_path).stdout
    assert sentence(keys("revoke", "key_none", data_dir=tmp_path)) == "server: There is no key 'key_none'."
    assert "1 to 128 printable ASCII" in sentence(keys("create", "--user", "a b", data_dir=tmp_path))
    assert keys("create", "--user", "ann", "--role", "king", data_dir=tmp_path).returncode == 2


def test_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "give --data-dir a folder that you may write to" in sentence(serve("--data-dir", str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "has no config.json: it is not a Hugging Face model directory."),
        ({"config.json": "{}"}, "has no weights (*.safetensors); download the whole model."),
        (None, "does not exist; give a Hugging Face directory or id."),
    ],
)
def test_an_invalid_model(tmp_path: Path, content: dict[str, str] | None, what: str) -> None:
    model, data_dir = tmp_path / "model", tmp_path / "data"
    if content is not None:
        model.mkdir()
        for name, text in content.items():
            (model / name).write_text(text)
    said = sentence(serve("--data-dir", str(data_dir), "--port", "0", "--model", str(model)))
    assert said == f"server: --model {str(model)!r} {what}"
    assert not (data_dir / "policies").exists()


def test_a_model_with_code_is_refused_without_a_question(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    change("config.json", model_type="mine", auto_map=AUTO_MAP)(tmp_path / "model")
    flags = ("--data-dir", str(tmp_path / "data"), "--model", str(tmp_path / "model"))
    said = f"--model {str(tmp_path / 'model')!r} {CODE}"
    assert sentence(serve(*flags, "--port", "0")) == f"server: {said}"
    assert list((tmp_path / "data").rglob("v0000*")) == []
    report = json.loads(server("doctor", "--json", *flags[2:], data_dir=tmp_path / "data").stdout)
    assert [finding["advice"] for finding in report["findings"] if finding["name"] == "model"] == [said]


def test_an_invalid_setting(tmp_path: Path) -> None:
    said = sentence(serve("--data-dir", str(tmp_path), PREFLOOP_SERVICE_TEMPERATURE="hot"))
    assert said.startswith("server: The setting service_temperature is not valid:")
    said = sentence(serve("--data-dir", str(tmp_path), PREFLOOP_COMPARE_TEMPERATURES="[0.9, 1.0]"))
    assert "must be below and above service_temperature" in said


def test_a_user_is_exported_and_deleted(tmp_path: Path) -> None:
    assert keys("create", "--user", "ann", data_dir=tmp_path).returncode == 0
    store = Store.open(tmp_path)
    store.policies.register_reference()
    conversation_id, vote = thumb(store, "ann")
    fence = lease(store)
    trained(store, fence, "v0001", {vote: "train"}, "reference", "v0000")
    running = store.rounds.create(store.snapshots.watermark(), {}, reference_version="v0000", fence=fence)
    store.lineage.set_round_votes(running.id, [(vote, "train")], fence=fence)

    out = tmp_path / "ann.jsonl"
    assert server("export-user", "ann", "--out", str(out), data_dir=tmp_path).returncode == 0
    conversation, key = map(json.loads, out.read_text().splitlines())
    assert conversation["conversation"]["conversation_id"] == conversation_id
    assert conversation["conversation"]["turns"][0]["message"] == "hello"
    assert key["key"]["role"] == "user"
    assert server("export-user", "ann", data_dir=tmp_path).stdout == out.read_text()

    declined = server("forget-user", "ann", data_dir=tmp_path, answer="n\n")
    assert declined.returncode == 1
    assert declined.stdout.startswith("ann: 1 conversations, 1 votes, and their keys.\n")
    assert len(store.conversations.page("ann", 9)) == 1
    assert server("forget-user", "ann", "--yes", data_dir=tmp_path).stdout.splitlines()[1:] == [
        "Deleted.",
        "Trained on these votes and unchanged: v0001, rm0001.",
        f"Still running on them: {running.id}; what it publishes is trained on them, too.",
        "No deleted data is left in the database's files.",
    ]
    assert store.conversations.page("ann", 9) == []
    assert "(deleted)" in keys("list", data_dir=tmp_path).stdout
    assert server("export-user", "ann", data_dir=tmp_path).stdout == ""
    assert store.deletion.rewrite_due() == 0
    store.close()


def test_calls_admitted_during_a_deletion_are_deleted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path)
    store.policies.register_reference()
    store.replicas.report("127.0.0.1:50051", "v0000")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        store.conversations.create("ann", "just in time")

    monkeypatch.setattr(forget_user.time, "sleep", sleep)
    assert list(forget_user.forget(store, tmp_path, "ann", 0.5))[-1] == forget_user.EMPTIED
    assert slept == [12.5]
    assert forget_user.LET_IN_SECONDS > interceptor.MESSAGE_SECONDS
    assert store.conversations.page("ann", 9) == []
    store.close()


def test_a_log_kept_by_a_reader_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path)
    store.conversations.create("ann", "hello")
    monkeypatch.setattr(SqliteDatabase, "empty_log", lambda database: False)
    assert list(forget_user.forget(store, tmp_path, "ann", 0.5)) == ["Deleted.", forget_user.NOT_EMPTIED]
    store.close()
