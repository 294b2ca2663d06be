"""Checks that the documentation matches the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from server.shared.variables import read_variables, unknown

PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *map(str, sorted(Path("docs").rglob("*.md"))),
]
PAGES += [f"clients/{language}/README.md" for language in ("go", "node")]


def test_the_reference_lists_every_command_and_setting(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "docs/generate.py", str(tmp_path / "made.md")], cwd=root, check=True, timeout=60)
    assert (tmp_path / "made.md").read_text() == (root / "docs" / "reference.md").read_text(), "run `make docs`"


def test_lists_and_copies_are_the_codes(root: Path, tmp_path: Path) -> None:
    for script in ("setting_names.py", "copies.py"):
        subprocess.run([sys.executable, f"docs/{script}", str(tmp_path)], cwd=root, check=True, timeout=60)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert list(map(str, made)) == [
        "clients/loopback.py",
        "clients/setting_names.py",
        "clients/variables.py",
        "learner/ops/report_page/chart.css",
        "learner/ops/report_page/chart.html.j2",
        "learner/ops/report_page/chart.py",
        "learner/ops/report_page/curves.py",
        "learner/reward/interval.py",
        "server/shared/setting_names.py",
    ]
    changed = [str(path) for path in made if (tmp_path / path).read_text() != (root / path).read_text()]
    assert changed == [], "run `make docs`"


def test_the_picture_of_the_floors_is_the_imports(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "docs/floors.py", str(tmp_path / "floors.svg")], cwd=root, check=True, timeout=60)
    assert (tmp_path / "floors.svg").read_text() == (root / "docs" / "floors.svg").read_text(), "run `make docs`"


def test_the_architecture_names_every_room_and_files_that_there_are(root: Path) -> None:
    text = (root / "ARCHITECTURE.md").read_text()
    rooms = {
        f"{house}/{room.name}/"
        for house in ("server", "learner")
        for room in (root / house).iterdir()
        if (room / "__init__.py").exists()
    }
    assert set(re.findall(r"^\| `(\w+/\w+/)` \|", text, re.MULTILINE)) == rooms
    named = re.findall(r"`([\w/]+\.py)`", text)
    found = {name for name in named if any((root / top / name).exists() for top in ("", "server"))}
    # These are in a list after the name of their folder.
    assert set(named) - found == {"snapshots.py", "linear_reward_model.py"}


@pytest.mark.parametrize("folder", ["server", "learner", "clients", "benchmarks", "deploy", "docs", "tests/e2e"])
def test_every_variable_in_the_code_is_in_the_list(root: Path, folder: str) -> None:
    """Every variable that the code reads or sets. A missing one belongs in docs/setting_names.py or is misspelled."""
    files = [
        path
        for path in (root / folder).rglob("*")
        if path.suffix in {".py", ".js", ".go", ".yaml", ".service", ".example"}
    ]
    named = {name for path in files for name in re.findall(r"PREFLOOP_[A-Z0-9_]*[A-Z0-9]", path.read_text())}
    assert sorted(unknown(read_variables(dict.fromkeys(named, "")))) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(root: Path, page: str) -> None:
    text = (root / page).read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not ((root / page).parent / link).exists()] == []


def test_the_readmes_python_runs_against_the_client(root: Path) -> None:
    from clients import Client

    # The other one is for OpenAI's client: docs/gateway.md has it, and a test runs it there.
    code, _ = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    compile(code, "README.md", "exec")
    called = set(re.findall(r"client\.(\w+)\(", code))
    assert called == {"chat", "compare", "choose"}
    assert all(hasattr(Client, name) for name in called)


def test_the_transcript_types_what_there_is(root: Path) -> None:
    from rich.console import Console

    from clients import Client
    from clients.cli import app
    from clients.terminal.session import Terminal

    section = (root / "docs" / "chat.md").read_text().split("\n## In the terminal\n")[1]
    starts = re.findall(r"^\$ (.*)$", section, re.MULTILINE)
    typed = set(re.findall(r"(?:^> |`)(/\w+)", section, re.MULTILINE))
    assert starts == [".venv/bin/chat", ".venv/bin/chat --resume"]
    assert {"/compare", "/correct", "/undo", "/history", "/quit", "/retry"} <= typed
    with Client() as client:
        assert typed <= set(Terminal(client, Console(), input).commands)
    flags = {flag for option in typer.main.get_command(app).params for flag in option.opts}
    assert set(re.findall(r"--\w+", " ".join(starts))) <= flags


def test_the_readmes_make_targets_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9]+):", (root / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"(?:^    |`)make ([a-z0-9]+)", (root / page).read_text(), re.MULTILINE)) <= targets
