"""The `learner` command: fast help, sentences instead of stack traces, JSON for programs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from learner.cli import app
from learner.model.rollout import SampledAnswer, to_rollout
from learner.settings import LearnerSettings
from server.store.store import Store

runner = CliRunner()


def test_help_is_fast() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "learner.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("run-once", "status", "report", "serve-scores", "schedule"))
    # Under a second on an idle machine; the limit leaves room for a busy one.
    assert time.monotonic() - started < 5


def test_run_once_without_data_exits_with_zero(tmp_path: Path) -> None:
    result = runner.invoke(app, ["run-once", "--data-dir", str(tmp_path / "none"), "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["state"] == "nothing"
    assert "no data" in report["sentence"]


def test_status_without_data(tmp_path: Path) -> None:
    result = runner.invoke(app, ["status", "--data-dir", str(tmp_path / "none")])
    assert result.exit_code == 0
    assert "there is no data" in result.stdout


def test_report_without_data_or_rounds(tmp_path: Path) -> None:
    result = runner.invoke(app, ["report", "--data-dir", str(tmp_path / "none")])
    assert (result.exit_code, "There is no data" in result.stderr) == (1, True)
    Store.open(tmp_path).close()
    result = runner.invoke(app, ["report", "--data-dir", str(tmp_path)])
    assert (result.exit_code, "No round has run here yet." in result.stderr) == (1, True)


def test_a_bad_setting_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFLOOP_PPO__STEPS", "none")
    result = runner.invoke(app, ["status", "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "ppo.steps is not valid" in result.output
    assert "Traceback" not in result.output


def test_an_unreachable_signal_level_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFLOOP_REWARD__PERMUTATIONS", "49")
    result = runner.invoke(app, ["status", "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "signal_p 0.02 is too small for 49 reward.signal_flips" in result.output
    assert result.stderr.startswith("PREFLOOP_REWARD__PERMUTATIONS is now PREFLOOP_REWARD__SIGNAL_FLIPS;")


def test_a_bad_cron_line_is_one_sentence(tmp_path: Path) -> None:
    result = runner.invoke(app, ["schedule", "--data-dir", str(tmp_path), "--cron", "now and then"])
    assert result.exit_code == 1
    assert "'now and then' is not a cron line: Wrong number of fields." in result.output


def test_an_invalid_time_zone_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "learner.cli", "schedule", "--data-dir", str(tmp_path)]
    result = subprocess.run(
        command, env={**os.environ, "TZ": "Mars/Olympus"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (
        1,
        "learner: TZ='Mars/Olympus' is not a time zone; use one such as Europe/Berlin.\n",
    )


def test_settings_flags_over_variables_over_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefloop.toml").write_text(
        'host = "0.0.0.0"\nmin_votes = 7\nseed = 1\n[ppo]\nsteps = 3\nepisodes = 16\n[gate]\nprompts = 20\n'
    )
    monkeypatch.setenv("PREFLOOP_SEED", "2")
    monkeypatch.setenv("PREFLOOP_PPO__STEPS", "4")
    settings = LearnerSettings.load(data_dir=Path("x"), policy={"train": "full"}, min_votes=None)
    assert (settings.min_votes, settings.seed, settings.gate.prompts) == (7, 2, 20)
    # Tables are merged, key by key.
    assert (settings.ppo.steps, settings.ppo.episodes, settings.policy.train) == (4, 16, "full")


def test_settings_survive_a_round_trip_through_the_store() -> None:
    settings = LearnerSettings(seed=3, ppo={"missing_eos_score": -1.0})
    stored = json.loads(json.dumps(settings.model_dump(mode="json", exclude={"data_dir"})))
    assert LearnerSettings(**stored, data_dir=settings.data_dir) == settings


def test_each_setting_has_a_description() -> None:
    for model in (LearnerSettings, *(f.annotation for f in LearnerSettings.model_fields.values())):
        for name, field in getattr(model, "model_fields", {}).items():
            assert field.description, f"{model} {name}"


def test_a_rollout_pads_what_was_sampled() -> None:
    rollout = to_rollout(
        [
            SampledAnswer([5, 6], [7, 2], [-0.5, -1.0], "a", "stop"),
            SampledAnswer([5], [8, 9, 9], [-1.0, -2.0, -3.0], "b", "length"),
        ]
    )
    assert rollout.tokens.input_ids.tolist() == [[5, 6, 7, 2], [5, 8, 9, 9]]
    assert rollout.behavior_logprobs.tolist() == [[-0.5, -1.0, 0.0], [-1.0, -2.0, -3.0]]
    assert rollout.ended.tolist() == [True, False]


def test_openmp_settings_are_set_before_torch_is_imported() -> None:
    code = (
        "import os, sys\n"
        "import learner.cli\n"
        "from learner.process import set_environment\n"
        "from learner.progress import Stages\n"
        "from learner.settings import LearnerSettings\n"
        "set_environment(LearnerSettings())\n"
        "print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False 100\n"
