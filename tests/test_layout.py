"""Rules of the tree: who may import whom, what loads when, and that the committed stubs are the protos'."""

import ast
import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

from clients.generate import generate

STORE = ("store", "database", "manifest", "records", "errors", "registry", "ids", "failpoints", "duel")
KEPT = ("erasing", "samples")
# What server and learner both decide by.
SHARED = ("dtype", "machine", "printable", "program", "settings_base", "seeds", "stored_round", "text", "whole_file")
LEARNER_MAY = {f"server.{name}" for name in (*STORE, *KEPT, *(f"shared.{name}" for name in SHARED))}


def imports(root: Path, package: str) -> set[str]:
    """Every module that any file of `package` imports, at whatever depth."""
    found: set[str] = set()
    for path in (root / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module}
    return found


def test_the_server_never_imports_the_learner_or_the_clients(root: Path) -> None:
    assert not {name for name in imports(root, "server") if name.split(".")[0] in {"learner", "clients"}}


def test_the_learner_imports_the_store_and_what_it_needs(root: Path) -> None:
    assert {name for name in imports(root, "learner") if name.split(".")[0] == "server"} <= LEARNER_MAY
    assert not {name for name in imports(root, "learner") if name.split(".")[0] == "clients"}


def test_the_clients_import_only_the_stubs(root: Path) -> None:
    assert not {name for name in imports(root, "clients") if name.split(".")[0] in {"server", "learner", "torch"}}


def without_encoding(path: Path) -> list[str]:
    """Where a file is opened as text in whatever encoding the machine has."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        mode = next((arg.value for arg in node.args if isinstance(arg, ast.Constant)), "")
        text = isinstance(mode, str) and 0 < len(mode) <= 3 and set(mode) <= set("rwxat+")
        if name in ("read_text", "write_text") or (name == "open" and text):
            found.append(f"{path}:{node.lineno}")
    return found


def test_texts_are_utf8_whatever_the_machines_locale(root: Path) -> None:
    ours = (path for package in ("server", "learner", "clients") for path in (root / package).rglob("*.py"))
    assert [place for path in ours for place in without_encoding(path)] == []


LIGHT = ("server.cli", "learner.cli", "clients.cli", "server.store.feedback_store", "server.process", "server.settings")
ALSO_LIGHT = ("learner.settings", "server.shared.settings_base", "server.doctor.examine")


@pytest.mark.parametrize("module", [*LIGHT, *ALSO_LIGHT])
def test_starting_a_command_loads_neither_torch_nor_vllm(module: str) -> None:
    check = f"import sys, {module}; sys.exit(bool({{'torch', 'vllm', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0


def test_the_committed_stubs_are_the_protos(root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "proto/generate.py", str(tmp_path)], cwd=root, check=True, timeout=60)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*")}
    kept = {path.relative_to(root / "proto") for path in (root / "proto").rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    assert made == kept
    changed = [name for name in made if not filecmp.cmp(tmp_path / name, root / "proto" / name, shallow=False)]
    assert changed == [], "run `make stubs`"


def test_the_committed_client_is_the_async_one_without_its_async(root: Path) -> None:
    assert generate() == (root / "clients" / "client.py").read_text(), "run `make stubs`"


def test_nothing_shadows_the_package_proto(root: Path) -> None:
    assert not (root / "proto" / "__init__.py").exists()
