"""What `deploy/` and `docs/operations.md` say is what the code has: settings, commands, ports, patience. No docker."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from clients.cli import app as chat
from learner.cli import app as learner
from learner.schedule import STOP_SECONDS
from server.cli import app as server
from server.exposition import Exposition
from server.settings import ServerSettings

PROGRAMS = {"server": server, "learner": learner, "chat": chat}
UNITS = ("prefloop-server.service", "prefloop-learner.service")
# Where a client's settings are; docs/reference.md has everybody else's.
CLIENTS = {"PREFLOOP_API_KEY", "PREFLOOP_CA", "PREFLOOP_USER"}


@pytest.fixture(scope="session")
def deploy(root: Path) -> Path:
    return root / "deploy"


@pytest.fixture(scope="session")
def compose(deploy: Path) -> Any:
    return yaml.safe_load((deploy / "compose.yaml").read_text())


def texts(root: Path) -> dict[str, str]:
    files = [path for path in (root / "deploy").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(root)): path.read_text() for path in [*files, root / "docs" / "operations.md"]}


def unit(deploy: Path, name: str) -> dict[str, list[str]]:
    """Every key of a unit with its values."""
    found: dict[str, list[str]] = {}
    for line in (deploy / "systemd" / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def seconds(text: str) -> int:
    return int(re.fullmatch(r"(\d+)s?", text)[1])  # type: ignore[index]


def check_command(words: list[str]) -> None:
    """Raises what the program would say of a command line that it does not know; a bare command is only looked up."""
    name, *arguments = words
    command: Any = typer.main.get_command(PROGRAMS[name])
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments.pop(0)]
    assert not getattr(command, "commands", None) or name == "chat", f"{words} names no command"
    if arguments:
        command.make_context(name, arguments)


def commands(root: Path) -> Iterator[str]:
    """Every command line of ours: what runs in containers and units, and what operators are told."""
    [command] = re.findall(r"^CMD (\[.*\])", (root / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    yield shlex.join(json.loads(command))
    for service in yaml.safe_load((root / "deploy" / "compose.yaml").read_text())["services"].values():
        if "command" in service:
            yield shlex.join(service["command"])
    for name in UNITS:
        [line] = unit(root / "deploy", name)["ExecStart"]
        yield line.removeprefix("/opt/prefloop/bin/")
    page = (root / "docs" / "operations.md").read_text()
    yield from re.findall(r"^    .*?((?<![-./\w])(?:server|learner|chat) (?!server)[^#\n]+)", page, re.MULTILINE)
    yield from re.findall(r"`((?:server|learner|chat) [^`.]+)`", page)


def test_every_variable_is_a_setting(root: Path) -> None:
    known = set(re.findall(r"`(PREFLOOP_\w+)`", (root / "docs" / "reference.md").read_text())) | CLIENTS
    used = {(name, file) for file, text in texts(root).items() for name in re.findall(r"PREFLOOP_\w+", text)}
    assert ("PREFLOOP_TLS_CERT", "deploy/compose.yaml") in used
    assert [(name, file) for name, file in sorted(used) if name not in known] == []


def test_every_metric_is_one(root: Path) -> None:
    known = set(re.findall(r"`(prefloop_\w+)`", (root / "docs" / "reference.md").read_text()))
    used = set(re.findall(r"`(prefloop_\w+)`", (root / "docs" / "operations.md").read_text()))
    assert "prefloop_swaps_total" in used
    assert sorted(used - known) == []


def test_every_command_line_is_one(root: Path) -> None:
    found = list(commands(root))
    assert {"server serve", "learner schedule"} <= set(found)
    assert "server backup /backups/2026-11-23" in found
    for line in set(found):
        check_command(shlex.split(line))


@pytest.mark.parametrize(
    "line", ["server", "server srve", "learner schedule --hourly", "server keys create --role user"]
)
def test_a_command_line_that_is_none_would_be_found(line: str) -> None:
    with pytest.raises(Exception, match=r"no command|No such option|Missing parameter"):
        check_command(line.split())


def test_ports_are_the_defaults(deploy: Path, compose: Any) -> None:
    fields = ServerSettings.model_fields
    assert fields["port"].default == 50051
    assert compose["services"]["server"]["ports"] == ["50051:50051"]
    assert re.findall(r"^EXPOSE (.+)", (deploy / "Dockerfile").read_text(), re.MULTILINE) == ["50051"]
    [scraped] = yaml.safe_load((deploy / "prometheus.yaml").read_text())["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": ["server:9464"]}]
    assert '"9464"' in (deploy / "healthcheck.py").read_text()
    assert fields["metrics_port"].default == 9464


def test_who_stops_is_waited_for(deploy: Path, compose: Any) -> None:
    assert (ServerSettings.model_fields["grace_seconds"].default, STOP_SECONDS) == (30.0, 60)
    # After the grace the engine has ten seconds to end.
    assert seconds(compose["x-prefloop"]["stop_grace_period"]) >= 75
    for name in UNITS:
        assert seconds(unit(deploy, name)["TimeoutStopSec"][0]) >= 75


def test_both_units_are_in_the_same_sandbox(deploy: Path) -> None:
    server_unit, learner_unit = (unit(deploy, name) for name in UNITS)
    own = {"Description", "After", "Wants", "ExecStart", "LimitNOFILE"}
    behind = {"CPUWeight": ["10"], "IOWeight": ["10"], "Nice": ["10"], "OOMScoreAdjust": ["500"]}
    assert {k: v for k, v in learner_unit.items() if k not in own} == {
        **{k: v for k, v in server_unit.items() if k not in own},
        **behind,
    }


@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_units(deploy: Path, tmp_path: Path, name: str) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    # It looks for the program; ours is not installed where it will be.
    text = (deploy / "systemd" / name).read_text().replace("/opt/prefloop/bin/", f"{Path(sys.executable).parent}/")
    (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert [line for line in (said.stdout + said.stderr).splitlines() if name in line] == []


def test_one_uv_everywhere(root: Path) -> None:
    [version] = re.findall(r"^UV_VERSION := (.+)", (root / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"UV_VERSION=([\d.]+)", (root / "deploy" / "Dockerfile").read_text()) == [version]
    assert re.findall(r"uv==([\d.]+)", (root / "docs" / "operations.md").read_text()) == [version]


def test_the_image_gets_what_it_copies(root: Path) -> None:
    allowed = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    needed = ["pyproject.toml", "README.md", "requirements", "proto", "server", "learner", "clients"]
    assert allowed == [*needed, "deploy/healthcheck.py"]
    copied = re.findall(r"^COPY (?!--from)(\S+)", (root / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert copied == ["pyproject.toml", "requirements", ".", ".", "deploy/healthcheck.py"]
    assert [path for path in allowed if not (root / path).exists()] == []


@pytest.mark.parametrize(("serving", "code"), [(True, 0), (False, 1)])
def test_the_health_check(deploy: Path, serving: bool, code: int) -> None:
    exposition = Exposition("127.0.0.1", 0, lambda: serving)
    # A proxy for the network is not asked.
    environment = {"PREFLOOP_METRICS_PORT": str(exposition.port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, str(deploy / "healthcheck.py")]
    try:
        assert subprocess.run(command, env=environment, timeout=30, check=False).returncode == code
    finally:
        exposition.close()
    gone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert gone.returncode == 1
    assert "Connection refused" in gone.stderr
