"""Checks `deploy/` and `docs/operations.md` against the code: settings, commands, ports, timeouts. Without Docker."""

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
from sse_starlette import EventSourceResponse

from clients.cli import app as chat
from clients.http.command import GRACE_SECONDS
from clients.web.sign_in import KEY, MONTH_SECONDS, NAME, NO_KEYS
from clients.web.site import AWAY
from learner.cli import app as learner
from learner.ops.schedule import STOP_SECONDS
from server.cli import app as server
from server.settings import ServerSettings
from server.telemetry.metrics_http import MetricsServer

PROGRAMS = {"server": server, "learner": learner, "chat": chat}
BOTH = ("prefloop-server.service", "prefloop-learner.service")
PAGE = "prefloop-web.service"
UNITS = (*BOTH, PAGE)
# It has no flag, so docs/reference.md mentions it only in a sentence.
API_KEY = "PREFLOOP_API_KEY"


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
    """The keys of a systemd unit with their values."""
    found: dict[str, list[str]] = {}
    for line in (deploy / "systemd" / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def seconds(text: str) -> int:
    return int(re.fullmatch(r"(\d+)s?", text)[1])  # type: ignore[index]


def check_command(words: list[str]) -> None:
    """Raises the program's error for an invalid command line; a command without arguments is only looked up."""
    name, *arguments = words
    command: Any = typer.main.get_command(PROGRAMS[name])
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments.pop(0)]
    assert not getattr(command, "commands", None) or name == "chat", f"{words} names no command"
    if arguments:
        context = command.make_context(name, arguments)
        # For a command that may also run alone, the arguments after its flags must name a subcommand.
        if below := getattr(command, "commands", None):
            rest = [*context._protected_args, *context.args]
            assert not rest or rest[0] in below, f"{words} names no command"


def commands(root: Path) -> Iterator[str]:
    """Every prefloop command line in containers, units and the operations page."""
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
    known = set(re.findall(r"`(PREFLOOP_\w+)`", (root / "docs" / "reference.md").read_text())) | {API_KEY}
    used = {(name, file) for file, text in texts(root).items() for name in re.findall(r"PREFLOOP_\w+", text)}
    assert {("PREFLOOP_TLS_CERT", "deploy/compose.yaml"), ("PREFLOOP_WEB_CERT", "deploy/compose.yaml")} <= used
    assert [(name, file) for name, file in sorted(used) if name not in known] == []


def test_every_metric_is_one(root: Path) -> None:
    known = set(re.findall(r"`(prefloop_\w+)`", (root / "docs" / "reference.md").read_text()))
    used = set(re.findall(r"`(prefloop_\w+)`", (root / "docs" / "operations.md").read_text()))
    assert "prefloop_swaps_total" in used
    # The cookies have names of the same form; they are tested below.
    assert sorted(used - known - {KEY, NAME}) == []


def test_every_command_line_is_one(root: Path) -> None:
    found = list(commands(root))
    assert {"server serve", "learner schedule", "chat web"} <= set(found)
    assert "server backup /backups/2026-11-23" in found
    for line in set(found):
        check_command(shlex.split(line))


@pytest.mark.parametrize(
    "line",
    ["server", "server srve", "learner schedule --hourly", "server keys create --role user", "chat --port 1 webb"],
)
def test_a_command_line_that_is_none_would_be_found(line: str) -> None:
    with pytest.raises(Exception, match=r"no command|No such option|Missing parameter"):
        check_command(line.split())


def test_ports_are_the_defaults(deploy: Path, compose: Any) -> None:
    fields = ServerSettings.model_fields
    assert fields["port"].default == 50051
    assert compose["services"]["server"]["ports"] == ["50051:50051"]
    assert re.findall(r"^EXPOSE (.+)", (deploy / "Dockerfile").read_text(), re.MULTILINE) == ["50051 8080"]
    [scraped] = yaml.safe_load((deploy / "prometheus.yaml").read_text())["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": ["server:9464"]}]
    assert '"9464"' in (deploy / "healthcheck.py").read_text()
    assert fields["metrics_port"].default == 9464


def test_the_replicas_are_where_the_proxy_looks_for_them(deploy: Path) -> None:
    file = yaml.safe_load((deploy / "compose.replicas.yaml").read_text())
    services = file["services"]
    named = [service["networks"]["default"]["ipv4_address"] for service in services.values() if "networks" in service]
    asked = re.findall(r"^    server [\w-]+ ([\d.]+):50051$", (deploy / "haproxy.cfg").read_text(), re.MULTILINE)
    assert named == asked == ["10.0.0.11", "10.0.0.12", "10.0.0.13", "10.0.0.14", "10.0.0.15"]
    ours = {name: service for name, service in services.items() if service["image"] == "prefloop:cpu"}
    assert list(ours) == ["one", "two", "three", "votes", "more-votes", "learner"]
    for service in ours.values():
        check_command(service.get("command", ["server", "serve"]))
    # All but two processes of one machine have a data directory of their own.
    data = [service["volumes"][0].partition(":")[0] for service in ours.values()]
    assert data == ["one", "two", "three", "votes", "votes", "learner"]
    mounted = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert {name for name in mounted if not name.startswith("./")} == set(file["volumes"])


def test_who_stops_is_waited_for(deploy: Path, compose: Any) -> None:
    assert (ServerSettings.model_fields["grace_seconds"].default, STOP_SECONDS) == (30.0, 60)
    # After the grace period the engine has ten seconds to end.
    assert seconds(compose["x-prefloop"]["stop_grace_period"]) >= 75
    for name in BOTH:
        assert seconds(unit(deploy, name)["TimeoutStopSec"][0]) >= 75
    # Time for open pages, then for their calls.
    assert GRACE_SECONDS == 3
    assert compose["services"]["web"]["stop_grace_period"] == "15s"
    assert unit(deploy, PAGE)["TimeoutStopSec"] == ["15"]


def test_the_page_is_found_where_it_listens(compose: Any) -> None:
    page = compose["services"]["web"]
    flags = {option.name: option for option in typer.main.get_command(chat).commands["web"].params}  # type: ignore[attr-defined]
    assert flags["web_port"].default == 8080
    assert page["ports"] == ["443:8080"]
    # One .env file has the settings of all three programs, so the container fixes those that it depends on.
    assert {flags[name].envvar for name in ("web_host", "web_port", "web_cert", "web_key", "web_server")} == set(
        page["environment"]
    )
    assert page["environment"]["PREFLOOP_WEB_PORT"] == 8080
    assert {"web_name", "web_origin"} == {name for name in flags if name.startswith("web_")} - {
        name.removeprefix("PREFLOOP_").lower() for name in page["environment"]
    }


def test_the_page_finds_the_server_by_the_name_in_its_certificate(compose: Any) -> None:
    services = compose["services"]
    name = "${PREFLOOP_WEB_SERVER:-server}"
    assert services["web"]["environment"]["PREFLOOP_WEB_SERVER"] == name
    assert services["server"]["networks"]["default"]["aliases"] == [name]
    # Compose substitutes only variables from this file, and the processes get the same file.
    assert compose["x-prefloop"]["env_file"] == [{"path": ".env", "required": False}]
    for part in ("CERT", "KEY"):
        mounted = services["server"]["environment"][f"PREFLOOP_TLS_{part}"]
        assert services["web"]["environment"][f"PREFLOOP_WEB_{part}"] == mounted


def test_the_page_has_no_data_and_little_else(compose: Any, deploy: Path) -> None:
    page = compose["services"]["web"]
    assert page["volumes"] == ["./tls:/etc/prefloop/tls:ro"]
    # Volumes declared by the image, which would otherwise become anonymous volumes that are never removed.
    [named] = re.findall(r"^VOLUME (.+)", (deploy / "Dockerfile").read_text(), re.MULTILINE)
    assert set(json.loads(named)) < set(page["tmpfs"])
    # The image's health check is for the server.
    assert page["healthcheck"] == {"disable": True}
    assert (page["mem_limit"], unit(deploy, PAGE)["MemoryMax"]) == ("512m", ["512M"])
    assert (page["read_only"], page["cap_drop"], page["profiles"]) == (True, ["ALL"], ["web"])


def test_both_units_are_in_the_same_sandbox(deploy: Path) -> None:
    server_unit, learner_unit = (unit(deploy, name) for name in BOTH)
    own = {"Description", "After", "Wants", "ExecStart", "LimitNOFILE"}
    behind = {"IOWeight": ["10"], "OOMScoreAdjust": ["500"]}
    assert {k: v for k, v in learner_unit.items() if k not in own} == {
        **{k: v for k, v in server_unit.items() if k not in own},
        **behind,
    }


def test_the_pages_sandbox_is_the_servers_and_closer(deploy: Path) -> None:
    server_unit, page = unit(deploy, BOTH[0]), unit(deploy, PAGE)
    own = {"Description", "After", "Wants", "ExecStart", "TimeoutStopSec"}
    # Needed only by an engine, or by the owner of the data.
    not_needed = {"User", "Environment", "ConfigurationDirectory", "StateDirectory", "StateDirectoryMode"}
    not_needed |= {"CacheDirectory", "CacheDirectoryMode"}
    closer = {
        "DynamicUser": ["yes"],
        "SupplementaryGroups": ["prefloop"],
        "WorkingDirectory": ["-/etc/prefloop"],
        "InaccessiblePaths": ["-/var/lib/prefloop -/var/cache/prefloop"],
        "MemoryMax": ["512M"],
        "ProcSubset": ["pid"],
        "MemoryDenyWriteExecute": ["yes"],
        "SystemCallFilter": ["@system-service", "~@privileged @resources"],
    }
    assert {k: v for k, v in page.items() if k not in own} == {
        **{k: v for k, v in server_unit.items() if k not in own | not_needed},
        **closer,
    }
    # `After` also makes the page stop first.
    assert page["After"] == ["network-online.target prefloop-server.service"]
    # The page must not see the directories that the others write.
    written = [
        f"/var/{kind}/{server_unit[key][0]}" for kind, key in (("lib", "StateDirectory"), ("cache", "CacheDirectory"))
    ]
    assert closer["InaccessiblePaths"] == [" ".join(f"-{path}" for path in written)]


def test_the_page_of_operations_knows_the_page(root: Path) -> None:
    page = (root / "docs" / "operations.md").read_text()
    assert re.findall(r"^\| `(prefloop_\w+)` \| (?:the API key|on a server)", page, re.MULTILINE) == [KEY, NAME]
    assert (MONTH_SECONDS, EventSourceResponse.DEFAULT_PING_INTERVAL) == (30 * 86400, 15)
    assert "For 30 days, or until they sign out" in page
    assert "at least every 15 seconds" in page
    # The quoted messages are those of the code.
    assert NO_KEYS.startswith("Strangers can reach this page, but the server has no keys to identify them")
    assert AWAY.startswith("The server is away, or just starting")
    for sentence in (NO_KEYS.partition(":")[0], AWAY.partition(".")[0]):
        assert f'"{sentence}' in page
    assert '"This form was sent by another site."' in page
    assert "This form was sent by another site." in (root / "clients" / "web" / "protection.py").read_text()


@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_units(deploy: Path, tmp_path: Path, name: str) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    # It checks that the program exists, which is not at its final path here.
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
    metrics_server = MetricsServer("127.0.0.1", 0, lambda: serving)
    # A proxy must not be used.
    environment = {"PREFLOOP_METRICS_PORT": str(metrics_server.port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, str(deploy / "healthcheck.py")]
    try:
        assert subprocess.run(command, env=environment, timeout=30, check=False).returncode == code
    finally:
        metrics_server.close()
    gone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert gone.returncode == 1
    assert "Connection refused" in gone.stderr
