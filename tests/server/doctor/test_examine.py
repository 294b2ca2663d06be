"""`server doctor` as an operator runs it, on a healthy setup and on broken ones."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.doctor import examine as module
from server.doctor import readings
from server.doctor.examine import DoctorSettings, Examination, Report, load_settings
from server.doctor.finding import Finding
from server.doctor.show import show
from server.shared.errors import ServiceError
from tests.postgres import PostgresServer

NAMES = [
    "python", "system", "system packages", "packages", "settings", "cores", "arithmetic", "gpu", "model", "memory",
    "speed", "disk", "store", "port", "metrics port",
]  # fmt: skip


def doctor(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it in a separate working directory, for its prefloop.toml."""
    return subprocess.run(
        [sys.executable, "-m", "server.cli", "doctor", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )


def states(report: dict[str, Any]) -> dict[str, str]:
    return {finding["name"]: finding["state"] for finding in report["findings"]}


def test_a_healthy_setup(tmp_path: Path) -> None:
    started = time.monotonic()
    result = doctor(tmp_path, "--json", PREFLOOP_PORT="0", PREFLOOP_METRICS_PORT="0")
    assert time.monotonic() - started < 30
    report = json.loads(result.stdout)
    assert list(states(report)) == NAMES
    assert [name for name, state in states(report).items() if state == "wrong"] == []
    assert result.returncode == 0
    assert report["state"] in ("ok", "warning")
    assert report["cores"] >= 0.5
    assert report["memory_bytes"] >= report["memory_available_bytes"] > 2**30
    assert report["dtype"] in ("bfloat16", "float32")
    assert report["dtype_reason"]
    assert report["tokens_per_second"].keys() == {"one", "sixteen", "prefill"}
    assert 1 < report["tokens_per_second"]["one"] < report["tokens_per_second"]["sixteen"]
    assert report["needed_bytes"].keys() == {"server", "round", "least_round", "version"}
    assert "slow_reason" in report
    # It leaves no files.
    assert list(tmp_path.iterdir()) == []


def test_a_broken_setup_has_a_sentence_for_each_problem(tmp_path: Path) -> None:
    (tmp_path / "prefloop.toml").write_text("port = 50051\nmax_tokens = -3\n")
    (tmp_path / "data").write_text("not a folder")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        # With invalid settings, the defaults are checked.
        result = doctor(tmp_path, "--model", "model", "--data-dir", "data")
        (tmp_path / "prefloop.toml").unlink()
        other = doctor(
            tmp_path, "--model", "model", "--data-dir", "data", PREFLOOP_PORT=port, PREFLOOP_METRICS_PORT="0"
        )
    said = result.stdout
    assert result.returncode == other.returncode == 1
    assert result.stderr == other.stderr == ""
    assert (
        "wrong, settings: The setting max_tokens is not valid: Input should be greater than or equal to 1. The other "
        "checks use the defaults." in said
    )
    assert "wrong, model: --model 'model' has no weights (*.safetensors); download the whole model." in said
    assert "wrong, disk: Nothing can be written there (Not a directory): give --data-dir a folder" in said
    assert (
        f"wrong, port: Cannot listen on 127.0.0.1:{port} (Address already in use): choose another --port."
        in other.stdout
    )
    assert "wrong, settings" not in other.stdout


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"port = \n", "prefloop.toml is not TOML: Invalid value (at line 1, column 8)."),
        (b'model = "\xff"\n', "prefloop.toml is not UTF-8."),
        (b"prot = 1\n", "Unknown setting: prefloop.toml: prot (did you mean port?)."),
        (b"kv_cache_gib = 0\n", "The setting kv_cache_gib is not valid: Input should be greater than or equal to 1."),
    ],
)
def test_an_invalid_prefloop_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefloop.toml").write_bytes(content)
    settings, found = load_settings(data_dir=tmp_path / "mine", model=None)
    assert found == problem
    # The flags count, the rest are defaults.
    assert (settings.data_dir, settings.model, settings.port) == (tmp_path / "mine", "smollm2", 50051)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (PermissionError(13, "Permission denied"), "prefloop.toml cannot be read (Permission denied)."),
        (ServiceError("Unknown setting: prot (did you mean port?)."), "Unknown setting: prot (did you mean port?)."),
    ],
)
def test_settings_that_cannot_be_loaded_are_a_finding(
    monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str
) -> None:
    def sources(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(module.DoctorSettings, "settings_customise_sources", sources)
    assert load_settings(model="mine")[1] == problem
    assert load_settings(model="mine")[0].model == "mine"


def test_the_learners_settings_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefloop.toml").write_text("keep_versions = 3\n[policy]\nmicro_batch_tokens = 200\n[ppo]\nsteps = 9\n")
    settings, problem = load_settings()
    assert (problem, settings.keep_versions, settings.policy.micro_batch_tokens) == ("", 3, 200)
    monkeypatch.setenv("PREFLOOP_POLICY__MICRO_BATCH_TOKENS", "400")
    assert load_settings()[0].policy.micro_batch_tokens == 400


def test_the_learners_setting_is_read_under_its_old_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFLOOP_PPO__MICRO_BATCH", "4")
    assert load_settings()[0].policy.micro_batch_tokens == 512
    monkeypatch.delenv("PREFLOOP_PPO__MICRO_BATCH")
    monkeypatch.setenv("PREFLOOP_PPO__MICRO_BATCH_TOKENS", "300")
    assert load_settings()[0].policy.micro_batch_tokens == 300


@pytest.mark.parametrize(("device", "learner"), [("auto", "0.3"), ("cuda:0", "0.3"), ("cuda:1", "0"), ("cpu", "0.3")])
def test_a_learner_on_another_gpu_takes_nothing_from_the_servers(
    monkeypatch: pytest.MonkeyPatch, device: str, learner: str
) -> None:
    monkeypatch.setattr(readings, "read_gpus", lambda: ["H100", "H100"])
    monkeypatch.setattr(readings, "read_builds", lambda: ["vllm"])
    monkeypatch.setattr(readings, "read_torch", lambda setting: readings.Torch(cuda=True))
    assert f"+ learner {learner} =" in Examination(DoctorSettings(learner_device=device), "").check_gpu().value


def test_a_reading_that_fails_is_a_finding_and_other_checks_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable() -> None:
        raise AttributeError("module 'os' has no attribute 'sched_getaffinity'")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "read_machine", unreadable)
    monkeypatch.setattr(readings, "read_torch", lambda setting: readings.Torch(problem="No module named 'torch'"))
    report = Examination(*load_settings(data_dir=tmp_path)).report()
    assert [finding.name for finding in report.findings] == NAMES
    found = {finding.name: finding for finding in report.findings}
    problem = "AttributeError: module 'os' has no attribute 'sched_getaffinity'"
    assert found["cores"] == Finding("cores", "wrong", "cannot be read", problem)
    assert found["arithmetic"].advice == "torch cannot be imported (No module named 'torch'): `make setup`."
    assert found["speed"] == Finding("speed", "ok", "not estimated: torch cannot be imported")
    assert found["disk"].state == "ok"
    assert report.figures == dict.fromkeys(report.figures)
    assert report.state == "wrong"


def test_an_installation_without_the_server_reports_what_is_missing() -> None:
    code = "import sys; sys.modules['sqlite_utils'] = None; from server.cli import app; app(['doctor'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "server: sqlite_utils is not installed: `make setup`, or install prefloop with the extra `cpu` or `gpu`.\n"
    )


def test_the_worst_finding_is_the_reports_state() -> None:
    fine, bad, worse = (Finding("x", state, "") for state in ("ok", "warning", "wrong"))
    assert Report([fine, fine], {}).state == "ok"
    assert Report([fine, bad, fine], {}).state == "warning"
    assert Report([worse, bad, fine], {}).state == "wrong"


def test_the_table_has_a_row_for_each_check_and_advice_below(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(
        [Finding("disk", "wrong", "/srv [ext4]", "Make room [now], or elsewhere."), Finding("cores", "ok", "2")], {}
    )
    show(report, Console(width=30))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "check         found",
        "disk   wrong  /srv [ext4]",
        "cores  ok     2",
        "",
        "wrong, disk: Make room [now], or elsewhere.",
    ]


def test_a_store_in_postgresql(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_STORE_URL", postgres.url())
    found = Examination(*load_settings()).check_store()
    assert (found.state, found.value) == ("ok", f"PostgreSQL 18.6 at postgresql://{postgres.folder}:5432/postgres")
    assert postgres.command("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    monkeypatch.setenv("PREFLOOP_STORE_URL", "postgresql://ann:secret@localhost:1/none")
    found = Examination(*load_settings()).check_store()
    assert (found.state, found.value) == ("wrong", "PostgreSQL")
    assert "postgresql://localhost:1/none cannot be used: " in found.advice
    assert "secret" not in found.advice
