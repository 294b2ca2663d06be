"""No setting is silently ignored: unknown ones are refused, renamed ones are reported."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import clients.variables
from learner.settings import LearnerSettings
from server.settings import ServerSettings
from server.shared import settings_base, variables
from server.shared.settings_base import SettingsBase, explain
from server.shared.tables import flatten, nest

# The variables of a pod with a Service named prefloop and one named prefloop-web.
KUBERNETES = {
    "PREFLOOP_PORT": "tcp://10.0.0.1:50051",
    "PREFLOOP_SERVICE_HOST": "10.0.0.1",
    "PREFLOOP_SERVICE_PORT": "50051",
    "PREFLOOP_SERVICE_PORT_GRPC_WEB": "50051",
    "PREFLOOP_PORT_50051_TCP": "tcp://10.0.0.1:50051",
    "PREFLOOP_PORT_50051_TCP_PROTO": "tcp",
    "PREFLOOP_PORT_50051_TCP_PORT": "50051",
    "PREFLOOP_PORT_50051_TCP_ADDR": "10.0.0.1",
    "PREFLOOP_PORT_53_UDP": "udp://10.0.0.1:53",
    "PREFLOOP_WEB_PORT": "tcp://[fd00::1]:8443",
    "PREFLOOP_WEB_SERVICE_PORT_HTTPS": "8443",
}
COMMANDS = {"server": ("server.cli", "keys", "list"), "learner": ("learner.cli", "status"), "chat": ("clients.cli",)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate working directory, for its prefloop.toml; every line may be printed again."""
    monkeypatch.chdir(tmp_path)
    settings_base._say.cache_clear()
    return tmp_path


def refused(load: Callable[[], SettingsBase]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load()
    return explain(error.value)


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("PREFLOOP_PROT", "PREFLOOP_PORT"),
        ("PREFLOOP_LEASE_SECOND", "PREFLOOP_LEASE_SECONDS"),  # the learner's
        ("PREFLOOP_WEB_SEVRER", "PREFLOOP_WEB_SERVER"),  # the page's
        ("PREFLOOP_PPO__LERNING_RATE", "PREFLOOP_PPO__LEARNING_RATE"),
        ("PREFLOOP_PPO__SCHEDULE__CRON", "PREFLOOP_SCHEDULE__CRON"),
        ("PREFLOOP_LORA_RANK", "PREFLOOP_POLICY__LORA_RANK"),
        ("PREFLOOP_PPO_STEPS", "PREFLOOP_PPO__STEPS"),
        ("prefloop_prot", "PREFLOOP_PORT"),
    ],
)
@pytest.mark.parametrize("settings", [ServerSettings, LearnerSettings])
def test_an_unknown_variable(
    monkeypatch: pytest.MonkeyPatch, settings: type[SettingsBase], variable: str, near: str
) -> None:
    monkeypatch.setenv(variable, "1")
    assert refused(settings.load) == f"Unknown setting: {variable.upper()} (did you mean {near}?)."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prot = 1", "prot (did you mean port?)"),
        ("[ppo]\nlerning_rate = 1", "[ppo] lerning_rate (did you mean [ppo] learning_rate?)"),
        # Keys after a table's header are in the table.
        ("[ppo]\nsteps = 3\nmin_votes = 9", "[ppo] min_votes (did you mean min_votes?)"),
        ("[ppo.more]\nx = 1", "[ppo.more] x"),
        ("[gates]\n", "gates (did you mean gate?)"),
        ("[server]\nport = 1", "[server] port (did you mean port?)"),
        ("web_port = 8443", "web_port (did you mean the variable PREFLOOP_WEB_PORT?)"),
        ("xyzzy = 1", "xyzzy"),
    ],
)
@pytest.mark.parametrize("settings", [ServerSettings, LearnerSettings])
def test_an_unknown_key(here: Path, settings: type[SettingsBase], text: str, found: str) -> None:
    (here / "prefloop.toml").write_text(text)
    assert refused(settings.load) == f"Unknown setting: prefloop.toml: {found}."


def test_all_unknown_names_are_in_one_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_SEDE", "1")
    (here / "prefloop.toml").write_text("prot = 1\n[ppo]\nstpes = 2\n")
    assert refused(LearnerSettings.load) == (
        "Unknown settings: PREFLOOP_SEDE (did you mean PREFLOOP_SEED?), prefloop.toml: [ppo] stpes (did you mean [ppo] "
        "steps?), prefloop.toml: prot (did you mean port?)."
    )


def test_each_program_ignores_the_others_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "prefloop.toml").write_text('host = "0.0.0.0"\nport = 1\nseed = 3\n[ppo]\nsteps = 4\n')
    for name in ("PREFLOOP_API_KEY", "PREFLOOP_WEB_NAME", "PREFLOOP_FAILPOINT", "PREFLOOP_NICE", "PREFLOOP_MAX_TOKENS"):
        monkeypatch.setenv(name, "9")
    server, learner = ServerSettings.load(port=2), LearnerSettings.load()
    assert (server.host, server.port, server.max_tokens) == ("0.0.0.0", 2, 9)
    assert (learner.seed, learner.ppo.steps, learner.nice) == (3, 4, 9)


def test_keys_and_variables_are_read_in_any_case(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "prefloop.toml").write_text("Seed = 3\n[PPO]\nSteps = 4\n")
    monkeypatch.setenv("prefloop_ppo__Epochs", "2")
    settings = LearnerSettings.load()
    assert (settings.seed, settings.ppo.steps, settings.ppo.epochs) == (3, 4, 2)


def test_a_table_may_be_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_PPO", '{"steps": 3, "epochs": 2}')
    monkeypatch.setenv("PREFLOOP_PPO__STEPS", "4")
    assert (LearnerSettings.load().ppo.steps, LearnerSettings.load().ppo.epochs) == (4, 2)
    monkeypatch.setenv("PREFLOOP_PPO", '{"stpes": 3}')
    assert refused(LearnerSettings.load) == "Unknown setting: ppo.stpes (did you mean ppo.steps?)."


def test_unreadable_settings_are_reported_in_a_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_COMPARE_TEMPERATURES", "warm")
    assert refused(ServerSettings.load).startswith(
        'The settings are not valid: error parsing value for field "compare_temperatures"'
    )
    (here / "prefloop.toml").write_text("port: 1\n")
    assert refused(ServerSettings.load).startswith("prefloop.toml is not TOML: Expected '=' after a key")
    (here / "prefloop.toml").write_bytes(b'model = "caf\xe9"\n')
    assert refused(ServerSettings.load) == "prefloop.toml is not UTF-8."


@pytest.mark.parametrize("check", [variables.check_variables, clients.variables.check_variables])
@pytest.mark.parametrize("name", KUBERNETES)
def test_variables_of_kubernetes_are_recognised(name: str, check: Callable[[dict[str, str]], None]) -> None:
    with pytest.raises(ValueError, match="Kubernetes sets") as error:
        check({name: KUBERNETES[name]})
    assert str(error.value) == (
        f"Kubernetes sets {name} for a Service whose name begins with prefloop: put `enableServiceLinks: false` into "
        "the pod's spec."
    )


def test_a_port_is_not_taken_for_a_service() -> None:
    variables.check_variables({"PREFLOOP_PORT": "50051", "PREFLOOP_WEB_PORT": "8080", "OTHER_PORT": "tcp://10.0.0.1:1"})
    with pytest.raises(variables.UnknownSettingError, match="Unknown setting: PREFLOOP_SERVICE_TEMPERATUR "):
        variables.check_variables({"PREFLOOP_SERVICE_TEMPERATUR": "1"})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_checks_its_settings_first(here: Path, command: str) -> None:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *COMMANDS[command], *arguments],
            capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment},
        )  # fmt: skip

    injected = run(**KUBERNETES, PREFLOOP_PROT="1")
    assert (injected.returncode, injected.stderr) == (
        1,
        f"{command}: Kubernetes sets PREFLOOP_PORT and 10 more for a Service whose name begins with prefloop: put "
        "`enableServiceLinks: false` into the pod's spec.\n",
    )
    unknown = run(PREFLOOP_PROT="1")
    assert unknown.stderr == f"{command}: Unknown setting: PREFLOOP_PROT (did you mean PREFLOOP_PORT?).\n"
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert run("--help", **KUBERNETES).returncode == 0
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "share", "default"),
    [(ServerSettings, "server_gpu_memory_share", 0.5), (LearnerSettings, "learner_gpu_memory_share", 0.3)],
)
def test_an_old_name_works_and_is_reported_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    settings: type[SettingsBase], share: str, default: float,
) -> None:  # fmt: skip
    assert getattr(settings.load(), share) == default
    monkeypatch.setenv("PREFLOOP_GPU_MEMORY_SHARE", "0.7")
    (here / "prefloop.toml").write_text("gpu_memory_share = 0.6\n")
    assert [getattr(settings.load(), share) for _ in range(2)] == [0.7, 0.7]
    until = "the old name works in this version, not in the next."
    assert capsys.readouterr().err.splitlines() == [
        f"PREFLOOP_GPU_MEMORY_SHARE is now PREFLOOP_{share.upper()}; {until}",
        f"prefloop.toml: gpu_memory_share is now {share}; {until}",
    ]
    monkeypatch.delenv("PREFLOOP_GPU_MEMORY_SHARE")
    assert getattr(settings.load(), share) == 0.6


def test_a_new_name_wins_wherever_it_is(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFLOOP_GPU_MEMORY_SHARE", "0.7")
    monkeypatch.setenv("PREFLOOP_PPO__DTYPE", "bfloat16")
    # A variable overrides the file, but not under an old name.
    (here / "prefloop.toml").write_text("learner_gpu_memory_share = 0.4\n")
    settings = LearnerSettings.load(dtype="float32")
    assert (settings.learner_gpu_memory_share, settings.dtype) == (0.4, "float32")
    assert capsys.readouterr().err.splitlines() == [
        "PREFLOOP_GPU_MEMORY_SHARE is ignored: its new name, learner_gpu_memory_share, is set too.",
        "PREFLOOP_PPO__DTYPE is ignored: its new name, dtype, is set too.",
    ]


def test_an_old_name_may_have_had_another_unit(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "prefloop.toml").write_text("[ppo]\nmicro_batch = 4\n")
    assert LearnerSettings.load().policy.micro_batch_tokens == 512
    monkeypatch.setenv("PREFLOOP_PPO__MICRO_BATCH", "2")
    assert LearnerSettings.load().policy.micro_batch_tokens == 256
    assert "PREFLOOP_PPO__MICRO_BATCH is now PREFLOOP_POLICY__MICRO_BATCH_TOKENS;" in capsys.readouterr().err
    for value in ("few", "0", "2.5", "-1", "inf"):
        monkeypatch.setenv("PREFLOOP_PPO__MICRO_BATCH", value)
        with pytest.raises(
            ValueError, match=rf"ppo\.micro_batch is not valid: '{value}' is not a whole number above zero"
        ):
            LearnerSettings.load()


def test_a_setting_may_leave_its_table(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "prefloop.toml").write_text('[ppo]\nsteps = 3\ndtype = "float32"\n')
    settings = LearnerSettings.load()
    assert (settings.dtype, settings.ppo.steps) == ("float32", 3)
    said = "prefloop.toml: [ppo] dtype is now dtype; the old name works in this version, not in the next.\n"
    assert capsys.readouterr().err == said
    # The server has its own setting, and does not report the learner's.
    assert ServerSettings.load().dtype == "auto"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PREFLOOP_PPO__DTYPE", "bfloat16")
    assert LearnerSettings.load().dtype == "bfloat16"


def test_a_setting_that_is_gone_is_ignored_with_a_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "prefloop.toml").write_text("[gate]\nearly_share = 0.1\nprompts = 40\n")
    monkeypatch.setenv("PREFLOOP_GATE__EARLY_SHARE", "0")
    assert LearnerSettings.load().gate.prompts == 40
    instead = "the gate looks after each gate.confirm_batch prompts"
    assert capsys.readouterr().err.splitlines() == [
        f"PREFLOOP_GATE__EARLY_SHARE is ignored: {instead}.",
        f"prefloop.toml: [gate] early_share is ignored: {instead}.",
    ]


def test_values_of_a_table_by_dotted_names() -> None:
    table = {"seed": 1, "ppo": {"steps": 3, "more": {"x": [1]}}, "gate": {}}
    flat = {"seed": 1, "ppo.steps": 3, "ppo.more.x": [1], "gate": {}}
    assert flatten(table) == flat
    assert nest(flat) == table
